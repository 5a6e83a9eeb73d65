"""What of a working directory does not travel with a job: whoever can reach the cluster's dashboard
reads what does."""

import os
import re
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path

# made anew, or of no use, elsewhere; behind a /: at the top alone
LEFT_OUT = [".git", ".venv", "venv", "__pycache__", "/runs", "/wandb"]
# Names of files and folders, in small letters, by which programs find their secrets: environments,
# private keys, and the logins of shells, clouds, clusters, package indices and hubs.
SECRETS = (
    *(".env*", "*.env", "secrets.*", ".secrets*"),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.ppk",
    ),
    *(".ssh", ".gnupg", ".netrc", "_netrc", ".pgpass", ".git-credentials", ".htpasswd"),
    *(".aws", ".azure", ".gcloud", "gcloud", ".kube", "kubeconfig*", ".docker", ".ray"),
    *(".pypirc", ".npmrc", ".yarnrc.yml", "credentials", "credentials*.json", "*credentials.json"),
    *("client_secret*.json", "service_account*.json", "service-account*.json"),
    *("auth_token", "auth_token.txt", "hf_token", "hf_token.txt", ".hf_token*", ".huggingface"),
    *("*.kdbx", "*.jks", "*.keystore", "*.tfstate", "*.tfstate.backup", "*.tfvars"),
    *(".vault-token", ".dockercfg", ".boto", ".s3cfg", "rclone.conf", ".my.cnf", ".databrickscfg"),
)
SECRET = re.compile("|".join(map(translate, SECRETS)))
NAMED = 20  # in one line


def left_behind(folder: Path) -> list[str]:
    """List what of `folder` must not travel, by its path there: SECRETS, and links that lead out of
    it, or back to a folder above them."""
    return sorted(_left_behind(folder.resolve(), (), ""))


def _left_behind(top: Path, above: tuple[Path, ...], inside: str) -> Iterator[str]:
    """Look through the folder whose path in `top` is `inside`, through links too; `above` are those
    on the way to it, as they are without links."""
    folder = top / inside
    way = (*above, Path(os.path.realpath(folder)))
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return
    for entry in entries:
        path = inside + entry.name
        if entry.name in LEFT_OUT or f"/{path}" in LEFT_OUT:
            continue
        real = Path(os.path.realpath(entry.path))
        linked = entry.is_symlink()
        leads_out = linked and not real.is_relative_to(top)
        leads_back = linked and any(each.is_relative_to(real) for each in way)
        # a link leads into what stays here by the name of a folder, too
        names = (entry.name, *(real.relative_to(top).parts if linked and not leads_out else ()))
        if leads_out or leads_back or any(SECRET.match(name.lower()) for name in names):
            yield path
        elif entry.is_dir():
            yield from _left_behind(top, way, f"{path}/")


def in_words(paths: list[str]) -> str:
    """Say in one line which paths are left behind."""
    names = ", ".join(path if path.isprintable() else ascii(path) for path in paths[:NAMED])
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"left behind, as secrets or links that lead out: {names}{more}"


def excluded(paths: list[str]) -> list[str]:
    """Put paths into patterns of a .gitignore. What such a file might read otherwise stands as a ?,
    which is any one character."""
    return ["/" + re.sub(r"[^\w./-]", "?", path) for path in paths]
