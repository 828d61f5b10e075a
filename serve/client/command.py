"""The client's command line: requests digits from a server, writes a picture and prints them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.client.again import compared, make_again, read_picture
from serve.client.channel import access_from, add_flags
from serve.client.client import DEFAULT_TIMEOUT_S, DigitClient
from serve.client.digits import Digits
from serve.client.errors import DigitError
from serve.command_line import INT63, TIMEOUT_S, UINT32, UINT64, OneLineParser, encodable, failed

STANDARD_OUTPUT = Path("-")
ASKED = ("count", "seed", "start", "digit", "truncation", "model", "version")  # the flags that say which digits


def as_text(pixels: NDArray[np.uint8], columns: int) -> str:
    """Digits (n, 28, 28) as braille characters, 2×4 pixels each: a digit is 14 characters wide and 7 lines high."""
    lines = []
    for first in range(0, len(pixels), columns):
        row = pixels[first : first + columns] > 127
        for line in range(7):
            lines.append(" ".join("".join(map(chr, _braille(digit[line * 4 : line * 4 + 4]))) for digit in row))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a server for digits; write a picture and print them."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.again is not None:
        for name in ASKED:
            if getattr(flags, name) != parser.get_default(name):
                return failed(f"--{name} cannot go with --again: the picture says which digits it is of")
    out = flags.out or Path("digits.png" if flags.again is None else f"{flags.again.stem}-again.png")
    try:
        picture = None if flags.again is None else read_picture(flags.again)
        client = DigitClient(flags.target, flags.timeout, access_from(flags), wait_for_server=False)
    except DigitError as error:
        return failed(error.details())
    try:
        with client:
            digits = _ask(client, flags) if picture is None else make_again(client, picture[0])
    except DigitError as error:
        return failed(f"{flags.target}: {error}", 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1)
    same, found = (True, "") if picture is None else compared(*picture, digits)
    found += "; " if found else ""
    seed, index = (digits.seed, digits.start) if picture is None else (picture[0].seed, picture[0].index)
    about = (
        f"{out}: {len(digits)} digits by {digits.model}/{digits.version}, seed {seed}, from {index}; "
        f"{found}queued {digits.queue_seconds * 1000:.1f} ms, computed {digits.compute_seconds * 1000:.1f} ms"
    )
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(digits.to_png())
        sys.stdout.flush()
        print(about, file=sys.stderr)
        return 0 if same else 1
    try:
        out.write_bytes(digits.to_png())
    except OSError as error:
        return failed(f"cannot write {out} ({error.strerror}); name another file with --out", 1)
    with suppress(UnicodeEncodeError):  # a terminal without braille: the picture is there
        print(encodable(as_text(digits.pixels, columns=5)))
    print(about)
    return 0 if same else 1


def _ask(client: DigitClient, flags: argparse.Namespace) -> Digits:
    return client.generate(
        flags.count,
        seed=flags.seed,
        start=flags.start,
        labels=flags.digit,
        truncation=flags.truncation,
        model=flags.model,
        version=flags.version,
    )


def _picture(text: str) -> Path:
    """A flag's ``type`` for argparse: a PNG file, or ``-``."""
    path = Path(text)
    if path.suffix.lower() not in ("", ".png"):
        raise argparse.ArgumentTypeError(f"{text} would not hold what its name says: pictures are PNG; name it {path.stem}.png")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.client", description="Ask a server for digits.")
    add_flags(parser)
    parser.add_argument("--count", type=UINT32, default=25, help="how many digits (default: 25)")
    parser.add_argument("--seed", type=UINT64, help="seed of the stream of digits (default: the server draws one)")
    parser.add_argument("--start", type=INT63, default=0, help="index of the first digit (default: 0)")
    parser.add_argument("--digit", type=UINT32, nargs="+", default=(), help="label: one for all digits, or one for each")
    parser.add_argument(
        "--truncation",
        type=float,
        default=0.0,
        help="largest absolute latent value: less variety, fewer malformed digits (default: 0, no truncation)",
    )
    parser.add_argument("--model", default="", help="model name (default: the server's)")
    parser.add_argument("--version", type=INT63, default=0, help="model version (default: the model's)")
    parser.add_argument("--timeout", type=TIMEOUT_S, default=DEFAULT_TIMEOUT_S, help="deadline in seconds (default: 30)")
    text = "make the digits of this PNG again, from what it says, and compare them; written to <its name>-again.png"
    parser.add_argument("--again", type=Path, metavar="PICTURE", help=text)
    parser.add_argument("--out", type=_picture, help="PNG to write; -: standard output (default: digits.png)")
    return parser


def _braille(dots: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Four rows of 28 dots as 14 code points; the bits' places are Unicode's."""
    places = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    blocks = dots.reshape(4, 14, 2)
    codes: NDArray[np.int64] = 0x2800 + (blocks * places[:, None, :]).sum(axis=(0, 2))
    return codes
