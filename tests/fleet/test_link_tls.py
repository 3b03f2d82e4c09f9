"""Links with TLS: the replica has a certificate that fronts check."""

import contextlib
import datetime
import ipaddress
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import Front, Replica

from hotset.cli.fleet_flags import server_tls
from hotset.engine.messages import Submit
from hotset.errors import ConfigError, EngineError
from hotset.fleet.address import Address
from hotset.request import SamplingParams

x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificates")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_file, key_file


def trusting(cert_file: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cert_file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "replica")


@pytest.fixture(scope="module")
def replica(files: tuple[Path, Path]) -> Iterator[Replica]:
    with contextlib.closing(Replica(Address(host="127.0.0.1"), server_tls(*files))) as made:
        yield made


def test_a_front_that_trusts_the_certificate_is_served(
    replica: Replica, files: tuple[Path, Path]
) -> None:
    front = Front(replica.address, tls=trusting(files[0]))
    front.host.submit(Submit("a", [5, 6], SamplingParams(max_tokens=5, ignore_eos=True)))
    assert sum(len(one.token_ids) for one in front.outputs("a")) == 5
    front.host.close()


def test_a_front_that_trusts_another_one_is_not(replica: Replica, tmp_path: Path) -> None:
    other, _ = make_certificate(tmp_path, "other")
    with pytest.raises(EngineError, match=r"no link to the replica at .*verify failed"):
        Front(replica.address, tls=trusting(other))


def test_a_front_without_tls_is_refused_with_one_line(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(EngineError, match=r"no link to the replica at"),
    ):
        Front(replica.address)
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert all(record.exc_info is None for record in caplog.records)


def test_a_front_with_tls_gets_nothing_from_a_replica_without(files: tuple[Path, Path]) -> None:
    with (
        contextlib.closing(Replica(Address(host="127.0.0.1"))) as plain,
        pytest.raises(EngineError, match=r"no link to the replica at"),
    ):
        Front(plain.address, tls=trusting(files[0]))


def test_files_that_are_no_certificates_are_refused(
    tmp_path: Path, files: tuple[Path, Path]
) -> None:
    text = tmp_path / "text.pem"
    text.write_text("hello")
    with pytest.raises(ConfigError, match=r"tls_cert .* cannot be used with its key"):
        server_tls(text, None)
    _, other_key = make_certificate(tmp_path, "other")
    with pytest.raises(ConfigError, match=r"tls_cert .* cannot be used with its key"):
        server_tls(files[0], other_key)
    assert isinstance(server_tls(*files), ssl.SSLContext)
