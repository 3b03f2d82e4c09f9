"""Where the members of a fleet find each other: flags of its commands."""

import ssl
from pathlib import Path

import click

from hotset.errors import ConfigError
from hotset.fleet.router import ROUTES

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
tls_ca_flag = click.option(
    "--tls-ca",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificates (PEM) of who signs those of replicas and desk: links use TLS.  [default: "
    "none]",
)
tls_key_flag = click.option(
    "--tls-key",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Its private key (PEM).  [default: in the file of the certificate]",
)
route_flag = click.option(
    "--route",
    type=click.Choice(list(ROUTES)),
    default=next(iter(ROUTES)),
    show_default=True,
    help="How a request's replica is chosen.",
)
fronts_flag = click.option(
    "--fronts",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many fronts the fleet has; each has its part of the limits of keys where the desk "
    "does not answer.",
)


def client_tls(authorities: Path) -> ssl.SSLContext:
    """How to check certificates. Raises ConfigError: the file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(authorities)
    except OSError as error:  # SSLError too
        reason = getattr(error, "reason", None) or error.strerror
        raise ConfigError(f"tls_ca {authorities} cannot be used: {reason}") from error
    return context


def server_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What a listener needs for TLS; None where there is no certificate.

    Raises:
        ConfigError: the files cannot be used, or there is a key alone.
    """
    if cert is None:
        if key is not None:
            raise ConfigError("tls_key is given without tls_cert; give both, or neither")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(cert, key, password="")  # or OpenSSL would ask for it
    except OSError as error:  # SSLError too
        reason = getattr(error, "reason", None) or error.strerror
        raise ConfigError(f"tls_cert {cert} cannot be used with its key: {reason}") from error
    return context


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
