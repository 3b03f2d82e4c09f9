"""Where the members of a fleet find each other: flags of its commands."""

from pathlib import Path

import click

directory_flag = click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder where fronts look for replicas.  [default: one of this user, on this machine]",
)
secret_flag = click.option(
    "--secret-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the fleet secret, the same for all replicas and fronts.  [default: one in the "
    "directory, made on first use]",
)


def find_fleet(directory: Path | None, secret_file: Path | None) -> tuple[Path, bytes]:
    """The folder of a fleet, which is made if it is not there, and its secret.

    Raises:
        ConfigError: the folder or the file cannot be used.
    """
    from hotset.fleet.directory import default_folder, make_private
    from hotset.secret import own_secret, read_secret

    folder = directory or default_folder()
    make_private(folder)
    return folder, own_secret(folder) if secret_file is None else read_secret(secret_file)
