"""However a training ends, its processes end with it; and until then a signal to all of them harms none."""

import signal

import pytest
from test_checkpoints import complete

CODES = {"returns": 0, "raises": 1, "bad": 1, "exits": 3}
KINDS = [("map", ""), ("map", "persistent"), ("stream", ""), ("stream", "persistent")]
SIGNALS = [(signal.SIGTERM, "all"), (signal.SIGTERM, "main"), (signal.SIGINT, "all"), (signal.SIGKILL, "main")]


def every(ways, *quick):
    """Every kind of loader in every way. All but the given pairs of these are slow."""
    pairs = [(kind, way) for kind in KINDS for way in ways]
    return [pytest.param(*pair, marks=[] if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(
    ("kind", "ending"),
    every(CODES, (KINDS[1], "returns"), (KINDS[1], "exits"), (KINDS[2], "bad"), (KINDS[3], "raises")),
)
def test_ends_by_itself(zygote, tmp_path, kind, ending):
    run = zygote.start("endings:train", tmp_path, *kind, ending, log=tmp_path / "log")
    assert run.finish()[0] == CODES[ending]


@pytest.mark.parametrize(
    ("kind", "sent"), every(SIGNALS, *zip((KINDS[1], KINDS[2], KINDS[0], KINDS[3]), SIGNALS, strict=True))
)
def test_ends_at_a_signal(zygote, tmp_path, kind, sent):
    """With a checkpoint, unless it was killed: a worker that a signal to all had ended would have ended the run."""
    number, to = sent
    run = zygote.start("endings:train", tmp_path / "run", *kind, "lasts", log=tmp_path / "log")
    run.wait_for(run.printed("step 2"))
    assert len(run.members()) == 3
    (run.signal_all if to == "all" else run.signal_it)(number)
    code, printed = run.finish()
    assert code == {signal.SIGTERM: 0, signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}[number]
    assert ("terminated: True" in printed) == (number == signal.SIGTERM)
    assert (printed.rstrip().rpartition("\n")[2] == "KeyboardInterrupt") == (number == signal.SIGINT)
    assert len(complete(tmp_path / "run")) == (0 if number == signal.SIGKILL else 1)
