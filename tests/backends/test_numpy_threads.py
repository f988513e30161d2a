"""The pool of the NumPy backend and its rules: everything done once, errors kept, never a wait for a busy pool."""

import os
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from deltaloom.backends.numpy import threads
from deltaloom.backends.numpy.threads import Pool, slices
from deltaloom.graph.errors import ConfigError


@pytest.fixture(autouse=True)
def restored():
    yield
    threads.use_threads(None)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_runs_once(n, count):
    seen: list[int] = []
    Pool(n).map(seen.append, range(count))
    assert sorted(seen) == list(range(count))


def test_work_is_shared():
    names = set()
    barrier = threading.Barrier(3, timeout=20)

    def run(item):
        names.add(threading.current_thread().name)
        barrier.wait()

    Pool(3).map(run, range(3))
    assert len(names) >= 2 and threading.current_thread().name in names


@pytest.mark.parametrize("n", [1, 2])
def test_an_error_reaches_the_caller_and_the_pool_survives(n):
    pool = Pool(n)

    def run(item):
        if item == 3:
            raise ValueError("item 3")

    for _ in range(3):
        with pytest.raises(ValueError, match="item 3"):
            pool.map(run, range(10))
    seen: list[int] = []
    pool.map(seen.append, range(4))
    assert sorted(seen) == [0, 1, 2, 3]


def test_what_was_run_is_let_go():
    """A worker that kept its last task would keep the arrays in it."""

    class Item:
        pass

    items = [Item(), Item()]
    kept = [weakref.ref(item) for item in items]
    barrier = threading.Barrier(2, timeout=20)
    pool = Pool(2)
    pool.map(lambda item: (barrier.wait(), item)[0], items)
    del items
    for _ in range(100):
        if not any(ref() for ref in kept):
            break
        time.sleep(0.01)
    assert not any(ref() for ref in kept)


def test_an_error_of_a_worker_reaches_the_caller():
    def run(item):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("worker")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="worker"):
        Pool(2).map(run, range(2))


def test_after_an_interrupt_the_next_call_is_complete(monkeypatch):
    pool, release = Pool(2), threading.Event()

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threads._Worker, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map(lambda item: threading.current_thread() is threading.main_thread() or release.wait(20), range(2))
    done: list[int] = []

    def slow(item):
        time.sleep(0.05)
        done.append(item)

    pool.map(slow, range(4))
    assert sorted(done) == [0, 1, 2, 3]
    release.set()


def test_a_nested_call_does_its_work_alone():
    pool, done = Pool(2), []
    pool.map(lambda i: pool.map(lambda j: done.append((i, j)), range(3)), range(3))
    assert sorted(done) == [(i, j) for i in range(3) for j in range(3)]


def test_a_second_caller_does_not_wait():
    pool = Pool(2)
    release, entered = threading.Event(), threading.Barrier(3, timeout=20)

    def hold(item):
        entered.wait()
        release.wait(20)

    first = threading.Thread(target=pool.map, args=(hold, range(2)))
    first.start()
    entered.wait()
    done: list[int] = []
    pool.map(done.append, range(5))
    assert done == [0, 1, 2, 3, 4]
    release.set()
    first.join()


def test_many_callers_at_once():
    pool, totals = Pool(2), []

    def caller():
        for _ in range(200):
            seen: list[int] = []
            pool.map(seen.append, range(4))
            totals.append(sum(seen))

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert totals == [6] * 800


def test_the_switch_interval_is_given_back():
    before = sys.getswitchinterval()
    inside = []
    Pool(2).map(lambda item: inside.append(sys.getswitchinterval()), range(2))
    assert inside == pytest.approx([threads.SWITCH_INTERVAL] * 2)
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(
    "length, count, unit", [(10, 3, 1), (10, 3, 4), (64, 2, 16), (65, 2, 16), (3, 8, 1), (5, 2, 16), (1, 1, 1)]
)
def test_slices(length, count, unit):
    parts = slices(length, count, unit)
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert 1 <= len(parts) <= count
    assert all(part.start % unit == 0 and part.stop > part.start for part in parts)


def test_threads_are_a_setting_of_the_process():
    if not threads.single_threaded_blas():
        pytest.skip("NumPy has no OpenBLAS here: the pool stays at one thread")
    assert threads.use_threads(3) is threads.pool() and threads.pool().n == 3
    assert threads.use_threads(3) is threads.pool()
    assert threads.use_threads(None).n == min(threads.cores(), 8)
    assert threads.team(True) is threads.pool() and threads.team(False).n == 1
    with pytest.raises(ConfigError, match="threads is 0"):
        threads.use_threads(0)


def test_an_unknown_blas_keeps_its_threads_and_the_pool_has_one(monkeypatch):
    monkeypatch.setattr(threads, "_openblas_files", lambda: [])
    assert not threads.single_threaded_blas()
    assert threads.use_threads(4).n == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_working_pool():
    if threads.use_threads(2).n == 1:
        pytest.skip("NumPy has no OpenBLAS here")
    threads.pool().map(lambda item: None, range(2))
    child = os.fork()
    if child == 0:
        total: list[int] = []
        threads.pool().map(total.append, range(4))
        os._exit(0 if sum(total) == 6 else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs in its pool")
    assert os.waitstatus_to_exitcode(status) == 0


def test_products_are_the_same_with_any_number_of_threads():
    from deltaloom.backends.numpy.linear import shared_product

    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((130, 300), np.float32), rng.standard_normal((300, 301), np.float32)
    results = []
    for n in (1, 2, 3):
        threads.use_threads(n)
        results.append(np.empty((130, 301), np.float32))
        shared_product(x, weight, results[-1])
    assert np.allclose(results[0], x @ weight, rtol=1e-4, atol=1e-4)
    assert np.allclose(results[0], results[1], rtol=1e-5, atol=1e-5) and np.allclose(results[0], results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (8, 8), (64, 8)])
def test_a_pool_has_a_thread_a_core_and_at_most_eight(monkeypatch, cores, expected):
    monkeypatch.setattr(threads, "cores", lambda: cores)
    monkeypatch.setattr(threads, "single_threaded_blas", lambda: True)
    assert threads.use_threads(None).n == expected
