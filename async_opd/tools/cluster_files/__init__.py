"""Files that make a cluster for a config: for KubeRay, Slurm, Ray's launcher, and a container image
for either."""

KINDS = {  # each with its template
    "kuberay": "kuberay.yaml",
    "slurm": "slurm.sh",
    "launcher": "launcher.yaml",
    "container": "Containerfile",
}
