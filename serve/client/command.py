"""The client's command line: requests digits from a server, writes a picture and prints them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.client.channel import access_from, add_flags
from serve.client.client import DEFAULT_TIMEOUT_S, DigitClient
from serve.client.diagnosis import described
from serve.command_line import INT63, TIMEOUT_S, UINT32, UINT64, OneLineParser, encodable, failed
from serve.errors import SettingsError
from serve.pictures import to_grid, to_png


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
    flags = _parser().parse_args(arguments)
    try:
        access = access_from(flags)
        with DigitClient(flags.target, flags.timeout, access, wait_for_server=False) as client:
            digits = client.generate(
                flags.count,
                seed=flags.seed,
                start=flags.start,
                labels=flags.digit,
                truncation=flags.truncation,
                model=flags.model,
                version=flags.version,
            )
    except grpc.RpcError as error:
        return failed(f"{flags.target}: {described(error, flags.target, access)}", 1)
    except (SettingsError, ValueError) as error:  # protobuf refuses a name that is no text before anything is sent
        return failed(error)
    try:
        flags.out.write_bytes(to_png(to_grid(digits.pixels)))
    except OSError as error:
        return failed(f"cannot write {flags.out} ({error.strerror}); name another file with --out", 1)
    with suppress(UnicodeEncodeError):  # a terminal without braille: the picture is there
        print(encodable(as_text(digits.pixels, columns=5)))
    print(
        f"{flags.out}: {len(digits.pixels)} digits by {digits.model}/{digits.version}, seed {digits.seed}, from {digits.start}; "
        f"queued {digits.queue_seconds * 1000:.1f} ms, computed {digits.compute_seconds * 1000:.1f} ms"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.client", description="Ask a server for digits.")
    add_flags(parser)
    parser.add_argument("--count", type=UINT32, default=25, help="how many digits (default: 25)")
    parser.add_argument("--seed", type=UINT64, help="seed of the stream of digits (default: the server draws one)")
    parser.add_argument("--start", type=INT63, default=0, help="index of the first digit (default: 0)")
    parser.add_argument("--digit", type=UINT32, nargs="+", default=(), help="which digit: one for all, or one for each")
    parser.add_argument("--truncation", type=float, default=0.0, help="no latent value beyond it (default: 0, none)")
    parser.add_argument("--model", default="", help="model name (default: the server's)")
    parser.add_argument("--version", type=INT63, default=0, help="model version (default: the model's)")
    parser.add_argument("--timeout", type=TIMEOUT_S, default=DEFAULT_TIMEOUT_S, help="deadline in seconds (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="picture to write (default: digits.png)")
    return parser


def _braille(dots: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Four rows of 28 dots as 14 code points; the bits' places are Unicode's."""
    places = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    blocks = dots.reshape(4, 14, 2)
    codes: NDArray[np.int64] = 0x2800 + (blocks * places[:, None, :]).sum(axis=(0, 2))
    return codes
