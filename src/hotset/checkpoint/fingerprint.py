"""A short name for the content of a checkpoint."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hotset.checkpoint.files import weight_files
from hotset.foreign_text import parse_json

# Raised when the same files become other weights, so that older KV is not found.
READING = b"3"

FULL_HASH_BYTES = 4 * 2**30  # checkpoints up to this size are hashed byte for byte
HASH_CHUNK_BYTES = 64 * 2**20
HASH_STRIDE_BYTES = 2**20
HASH_SAMPLE_BYTES = 16 * 2**10


def fingerprint(source: Path) -> str:
    """Hash a checkpoint's config and weights: 32 hex digits, independent of names and times.

    It changes, too, when a version of hotset reads the same files differently.

    Checkpoints up to 4 GiB are hashed byte for byte. Of larger ones 16 KiB at each MiB are hashed,
    with each file's size: a change of a whole tensor of a MiB or more (another training, a merge,
    another quantisation) is seen, an edit of single values may not be.
    """
    if source.is_file():
        files, digest = [source], hashlib.blake2b(digest_size=16)
    else:
        config = parse_json((source / "config.json").read_bytes())
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        files = weight_files(source)
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    sizes = [file.stat().st_size for file in files]
    take = HASH_STRIDE_BYTES if sum(sizes) <= FULL_HASH_BYTES else HASH_SAMPLE_BYTES
    chunks = [
        (file, start, min(start + HASH_CHUNK_BYTES, size), take)
        for file, size in zip(files, sizes, strict=True)
        for start in range(0, size, HASH_CHUNK_BYTES)
    ]
    digest.update(READING + repr(sizes).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        for chunk_digest in pool.map(_hash_chunk, chunks):
            digest.update(chunk_digest)
    return digest.hexdigest()


def _hash_chunk(chunk: tuple[Path, int, int, int]) -> bytes:
    file, start, end, take = chunk
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb", buffering=0) as handle:
        for position in range(start, end, HASH_STRIDE_BYTES):
            handle.seek(position)
            digest.update(handle.read(min(take, end - position)))
    return digest.digest()
