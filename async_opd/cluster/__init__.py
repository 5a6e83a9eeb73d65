"""Files that make a cluster for a config: for KubeRay, Slurm, Ray's launcher, and a container image for either."""
