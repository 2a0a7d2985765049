"""What a campaign is, and how inputs are damaged.

An input is bytes, whatever it stands for, so that one that found something is a file.  A campaign
makes inputs from a seeded generator, and says of each what became of it; an exception other than
those it allows is a finding.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

CORPUS = Path(__file__).parent / "corpus"
MOST_CPU_S = 0.05
"""CPU seconds that one input may cost; of three tries the best counts."""

Check = Callable[[bytes], Awaitable[str]]
"""Tries an input; returns the outcome as a word, or raises."""


@dataclass(frozen=True)
class Campaign:
    """Inputs of one kind.

    Attributes:
        make: makes an input.
        open: prepares what the inputs are tried on.
        slice_inputs: how many are tried by the unit tests.
    """

    name: str
    make: Callable[[Random], bytes]
    open: Callable[[], AbstractAsyncContextManager[Check]]
    slice_inputs: int = 500

    def corpus(self) -> Iterator[Path]:
        """Inputs that once found something."""
        yield from sorted((CORPUS / self.name).glob("*"))


@dataclass
class Outcome:
    """What a campaign came to.

    Attributes:
        became: how many inputs became what.
        found: what is wrong, by input.
        slowest_s: CPU time of the slowest input.
    """

    became: Counter[str] = field(default_factory=Counter)
    found: dict[bytes, str] = field(default_factory=dict)
    slowest_s: float = 0.0


def plain(check: Callable[[bytes], str]) -> Callable[[], AbstractAsyncContextManager[Check]]:
    """`Campaign.open` for a check that needs nothing prepared."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Check]:
        async def run(data: bytes) -> str:
            return check(data)

        yield run

    return opened


async def run_for(campaign: Campaign, seed: int, seconds: float) -> Outcome:
    """Try inputs for some time; of findings of one kind from one place the first is kept."""
    outcome, random, places = Outcome(), Random(seed), set[str]()
    deadline = time.monotonic() + seconds
    async with campaign.open() as check:
        while time.monotonic() < deadline:
            await trio.lowlevel.checkpoint()
            data = campaign.make(random)
            started = time.process_time()
            try:
                outcome.became[await check(data)] += 1
                cost_s = time.process_time() - started
                outcome.slowest_s = max(outcome.slowest_s, cost_s)
                if cost_s > MOST_CPU_S and await _is_slow(check, data):
                    raise TimeoutError(f"{len(data)} bytes took {cost_s:.3f} s of CPU")
            except Exception as error:
                place = _place(error)
                if place not in places:
                    places.add(place)
                    outcome.found[data] = f"{place}: {str(error)[:200]!r}"
    return outcome


async def _is_slow(check: Check, data: bytes) -> bool:
    for _ in range(2):
        started = time.process_time()
        await check(data)
        if time.process_time() - started <= MOST_CPU_S:
            return False
    return True


def _place(error: Exception) -> str:
    """An exception and where it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__} at {at}"


def keep(campaign: Campaign, data: bytes) -> Path:
    """Add an input to the corpus."""
    file = CORPUS / campaign.name / sha256(data).hexdigest()[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


# --- damage -------------------------------------------------------------------------------------

TEXTS = (
    "", "\0", "\n", "..", "../../etc/passwd", "a/b", "%2e%2e", "\x1b[2J", "\u202e", "é", "\ud800",
    "h1\n", "-rf", "$(reboot)", "; reboot", "'", '"', "x" * 64, "x" * 300, "x" * 60_000, "all",
    "0.0.0.0", "255.255.255.255", "10.42.0.0/16", "10.42.0.1/16", "10.0.0.0/0",
    "10.0.0.0/255.0.0.0", "10.42.0.2/0032999", "10.42.0.0/" + "0" * 5000, "::", "::/0", "::1",
    "ff02::1", "fe80::1%eth0", "::ffff:10.0.0.1", "fd00::%x/48", "240.0.0.0/4", "١.٢.٣.٤",
    "02:6d:0a:2a:01:00", "kernel",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 24, 33, 128, 129, 255, 576, 4097, 65_535, 65_536, (1 << 22) + 1, 1 << 24, 1 << 31,
    (1 << 63) - 1, 1 << 63, 1 << 64, 10**4000, 0.5, -0.0, 1e308, float("inf"), float("nan"),
)  # fmt: skip
_MOST_BYTES = 200_000
_SPELLED = {'"HUGE"': "1" + "0" * 5000, '"DEEP"': "[" * 990 + "]" * 990, '"BOTTOMLESS"': "[" * 9000}
"""Text that the JSON module cannot write, or not as fast."""


def hostile_value(random: Random) -> Any:  # noqa: ANN401
    """Make a JSON value that does not belong there."""
    match random.randrange(9):
        case 0 | 1 | 2:
            return random.choice(TEXTS)
        case 3 | 4:
            return random.choice(NUMBERS)
        case 5:
            return random.choice((None, True, False, [], {}, *(s[1:-1] for s in _SPELLED)))
        case 6:
            return [hostile_value(random) for _ in range(random.randrange(4))]
        case 7:
            return [random.choice(TEXTS[:10])] * random.choice((2, 65, 1000, 12_000))
        case _:
            return {random.choice(TEXTS[:20]): hostile_value(random)}


def damage_document(random: Random, document: Any) -> Any:  # noqa: ANN401
    """The document with one place changed, removed, repeated or added."""
    if isinstance(document, dict) and document and random.randrange(5):
        key = random.choice(list(document))
        changed = dict(document)
        match random.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[random.choice(TEXTS)] = changed[key]
            case _:
                changed[key] = damage_document(random, changed[key])
        return changed
    if isinstance(document, list) and document and random.randrange(4):
        changed_list = list(document)
        at = random.randrange(len(changed_list))
        if random.randrange(4):
            changed_list[at] = damage_document(random, changed_list[at])
        else:
            changed_list *= random.choice((0, 2, 3, 40)) if len(changed_list) < 10 else 2
        return changed_list
    if isinstance(document, str) and document and random.randrange(3):
        at = random.randrange(len(document))
        return (
            document[:at]
            + random.choice(("", "0", "9", "/", ":", "\0", "%", "é"))
            + (document[at + random.randrange(2) :])
        )
    return hostile_value(random)


def spell(document: Any) -> bytes:  # noqa: ANN401
    """A document as JSON, with what Python itself would not write."""
    text = json.dumps(document, ensure_ascii=False)
    for word, spelled in _SPELLED.items():
        text = text.replace(word, spelled)
    return text.encode("utf-8", "surrogatepass")


def damage_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with a few of them flipped, cut off, removed, repeated or inserted."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(found) + 1)
        match random.randrange(7):
            case 0:
                del found[at:]
            case 1:
                del found[at : at + random.choice((1, 2, 4, 16))]
            case 2:
                found[at:at] = random.randbytes(random.choice((1, 2, 4, 16)))
            case 3:
                found[at:at] = found[at : at + random.choice((1, 4, 16, 64))]
            case 4 if at < len(found):
                found[at] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
            case _ if at < len(found):
                found[at] ^= 1 << random.randrange(8)
            case _:
                found += random.randbytes(4)
    return bytes(found)


def damaged(random: Random, document: Any) -> bytes:  # noqa: ANN401
    """A document as JSON, damaged as such or as bytes."""
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        document = damage_document(random, document)
    raw = spell(document)[:_MOST_BYTES]
    return raw if random.randrange(4) else damage_bytes(random, raw)


def pack(*parts: bytes) -> bytes:
    """Parts as one input."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """The parts of an input."""
    parts = []
    while data:
        size = int.from_bytes(data[:4], "big")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts


def assert_clear(text: str) -> None:
    """Assert that a message is one line that is safe for a terminal, a log and a JSON document."""
    assert text.isprintable(), f"not printable: {text!r:.100}"
    assert len(text) <= 1000, f"{len(text)} characters: {text!r:.100}"
