"""What the pool of threads leaves undone after an error or an interrupt."""

import threading
import time

import pytest

from deltaloom.backends.numpy import threads
from deltaloom.backends.numpy.threads import Pool


@pytest.mark.parametrize("in_worker", [False, True], ids=["caller", "worker"])
def test_after_an_error_nothing_new_is_begun(in_worker):
    done: list[int] = []
    failed = threading.Event()

    def run(item):
        here = threading.current_thread() is not threading.main_thread()
        if here == in_worker and not failed.is_set():
            failed.set()
            raise ValueError("the first")
        failed.wait(20)
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="the first"):
        Pool(2).map(run, range(100))
    assert len(done) <= 3


def test_after_an_interrupt_workers_finish_what_they_hold_and_go(monkeypatch):
    pool = Pool(2)
    pool.map(lambda item: None, range(2))
    (worker,) = pool._workers
    done: list[int] = []
    began, release = threading.Event(), threading.Event()

    def interrupted(self):
        raise KeyboardInterrupt

    def run(item):
        if threading.current_thread() is threading.main_thread():
            began.wait(20)
            raise KeyboardInterrupt
        began.set()
        release.wait(20)
        done.append(item)

    with monkeypatch.context() as patched:
        patched.setattr(threads._Worker, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map(run, range(50))
    assert pool._workers == [] and worker.retired
    release.set()
    worker.wait()
    assert len(done) == 1


def test_an_interrupt_while_workers_are_started_leaves_no_work_to_those_that_run(monkeypatch):
    pool, start = Pool(3), threads._Worker.start
    started: list[threads._Worker] = []
    done: list[int] = []
    began, release = threading.Event(), threading.Event()

    def run(item):
        began.set()
        release.wait(20)
        done.append(item)

    def second_is_interrupted(self, task):
        if started:
            began.wait(20)
            raise KeyboardInterrupt
        started.append(self)
        start(self, task)

    with monkeypatch.context() as patched:
        patched.setattr(threads._Worker, "start", second_is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map(run, range(50))
    release.set()
    started[0].wait()
    assert len(done) == 1
