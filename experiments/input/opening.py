"""Files as bytes in memory maps, compressed ones decompressed once."""

import gzip
import hashlib
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from experiments.errors import UserError, reading

COMPRESSED = (".gz", ".zst", ".zstd")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Content:
    """The bytes of a file, after decompression.

    Attributes:
      path: The file.
      data: All bytes, mapped; only what is accessed takes memory.
      digest: SHA-256 of the data.
    """

    path: Path
    data: "mmap.mmap | bytes"
    digest: str

    def text_start(self) -> int:
        """The offset of the first character of a UTF-8 text, after a byte order mark.

        Raises:
          UserError: The text is UTF-16 or UTF-32.
        """
        head = self.data[:4]
        if head.startswith(b"\xef\xbb\xbf"):
            return 3
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
            raise UserError(f"{self.path}: UTF-16 or UTF-32 text, expected UTF-8; iconv or an editor can convert it")
        return 0


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case, without that of its compression.

    Example:
      >>> data_suffix(Path("train.JSONL.gz"))
      '.jsonl'
    """
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def open_content(path: Path) -> Content:
    """The content of a file; one compressed by gzip or zstd, whatever its name, is decompressed.

    A compressed file is decompressed into a temporary file without a name, in `$TMPDIR`, that goes with the process.

    Args:
      path: A regular file.

    Raises:
      UserError: It cannot be read, or the compressed data are damaged or incomplete.
    """
    with reading(path, "compressed data" if path.suffix.lower() in COMPRESSED else ""), path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head.startswith((_GZIP, _ZSTD)):
            with tempfile.TemporaryFile() as spool:
                for chunk in _gunzip(file) if head.startswith(_GZIP) else _unzstd(file):
                    spool.write(chunk)
                spool.flush()
                return _mapped(path, spool)
        if path.suffix.lower() in COMPRESSED and head:
            raise UserError(f"{path}: not compressed by gzip or zstd, though it is named {path.suffix}")
        return _mapped(path, file)


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """By frames: the library's own stream reader takes a frame that is cut off for a whole one."""
    frame = None
    while data := file.read(_CHUNK):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame is incomplete")


def _mapped(path: Path, file: BinaryIO) -> Content:
    file.seek(0, 2)
    if not file.tell():
        return Content(path, b"", hashlib.sha256().hexdigest())
    data, digest = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), hashlib.sha256()
    for start in range(0, len(data), _CHUNK):
        digest.update(data[start : start + _CHUNK])
    return Content(path, data, digest.hexdigest())
