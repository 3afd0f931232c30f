"""What runs keep for the next one, when they are killed or start at the same time."""

import signal

import pytest


class Cache:
    def __init__(self, zygote, folder):
        self.zygote, self.folder = zygote, folder

    def start(self, name, num_proc=1):
        return self.zygote.start("endings:map_slowly", self.folder, num_proc, log=self.folder / f"{name}.log")

    def files(self):
        return sorted(path.name for path in (self.folder / "pals_hf").rglob("*") if path.is_file())


@pytest.fixture(name="cache")
def _cache(zygote, tmp_path):
    return Cache(zygote, tmp_path)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_kill_leaves_nothing_that_counts_or_stays(cache, num_proc):
    for name in ("killed", "killed again"):
        run = cache.start(name, num_proc)
        run.wait_for(run.printed("called\ncalled\n"))
        run.signal_it(signal.SIGKILL)
        assert run.finish()[0] == -signal.SIGKILL
    assert len([name for name in cache.files() if name.startswith("tmp")]) <= num_proc
    code, printed = cache.start("whole", num_proc).finish()
    assert (code, printed.count("called")) == (0, 40)
    assert len(cache.files()) == 1 + num_proc  # and the lock
    code, printed = cache.start("again", num_proc).finish()
    assert (code, printed.count("called")) == (0, 0)


def test_two_at_once(cache):
    first = cache.start("first")
    first.wait_for(first.printed("called"))
    second = cache.start("second")
    assert first.finish()[0] == 0
    code, printed = second.finish()
    assert (code, printed.count("called")) == (0, 0)
    assert "Another process is preparing the same data" in printed
    assert cache.files() == ["lock", "rows.arrow"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_ctrl_c(cache, num_proc):
    run = cache.start("run", num_proc)
    run.wait_for(run.printed("called\ncalled\n"))
    run.signal_all(signal.SIGINT)
    code, printed = run.finish()
    assert (code, printed.splitlines()[-1], "Traceback" in printed) == (130, "stopped by SIGINT", False)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    import datasets
    from endings import cached_map, numbers

    (tmp_path / "pals_hf").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert cached_map(numbers(), lambda row: {"x": -row["x"]}, "negative")["x"][3] == -3
