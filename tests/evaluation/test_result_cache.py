"""The cache of results: JSON comes back, a planted pickle is never loaded, a killed writer and a second process do no
harm."""

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from arc.evaluation.result_cache import SETTINGS, UntrustedCacheError, open_cache
from tests.helpers import ROOT

WRITER = """
import sys
from arc.evaluation.result_cache import open_cache
cache = open_cache(sys.argv[1])
for number in range(10**6):
    # Small values are in the database, every third is in a file of its own; the first two say what the third holds.
    cache[f"{number}"] = {"number": number}
    if number % 3 == 0:
        cache[f"large {number}"] = [number * k % 1000003 for k in range(30000)]
    print(number, flush=True)
"""


class Command:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def bomb(ran):
    planted = pickle.dumps(Command(ran))
    pickle.loads(planted)
    assert ran.exists()  # it does run a command, wherever it is loaded
    ran.unlink()
    return planted


@pytest.fixture
def folder(tmp_path):
    with open_cache(tmp_path / "cache") as cache:
        cache["good"] = [1, 2, 3]
    return tmp_path / "cache"


def plant(folder, **fields):
    """Put a row into the cache's table, as someone who can write to the folder can."""
    row = {"raw": 1, "store_time": 0.0, "access_time": 0.0, "size": 0, "mode": 1} | fields
    with sqlite3.connect(folder / "cache.db") as connection:
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO Cache ({', '.join(row)}) VALUES ({marks})", list(row.values()))
    connection.close()


def key_bytes(folder, key):
    with open_cache(folder) as cache:
        return bytes(cache.disk.put(key)[0])


def test_json_values_come_back(tmp_path):
    values = {
        "text": "äöü \n \u2028", "number": 0.1, "big": 2**70, "none": None, "grid": [[0, 1], [2, 3]],
        "nested": {"a": [True, False, {"b": "c"}]}, "long": list(range(50000)),
    }  # fmt: skip
    with open_cache(tmp_path / "a $ ~ cache") as cache:
        for name, value in values.items():
            cache[name] = value
        cache[["a", 1, None]] = "a key need not be text"
    assert (tmp_path / "a $ ~ cache" / "cache.db").is_file()  # a folder's name is taken as it is
    with open_cache(tmp_path / "a $ ~ cache") as cache:
        assert {name: cache[name] for name in values} == values
        assert cache[["a", 1, None]] == "a key need not be text"
        assert set(map(str, cache)) == {*values, "['a', 1, None]"} and "number" in cache and "other" not in cache
        assert cache.get("other", 7) == 7 and cache.pop("none", 7) is None and cache.pop("none", 7) == 7
        assert cache.check() == []
        with pytest.raises(TypeError):
            cache["object"] = object()
        with (folder := tmp_path / "file").open("wb") as file:
            file.write(b"x")
        with folder.open("rb") as file, pytest.raises(TypeError, match="JSON values, not files"):
            cache.set("file", file, read=True)


def test_a_name_that_would_be_expanded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would expand"):
        open_cache(tmp_path / "$HOME")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_dropped_to_make_room(tmp_path):
    with open_cache(tmp_path / "cache") as cache:
        cache.reset("size_limit", 1000)
        for number in range(20):
            cache[str(number)] = [number] * 30000
        assert len(cache) == 20 and cache.cull() == 0


def uses(cache):
    """Everything that reads or removes what a cache holds, by name."""
    return {
        "get": lambda: cache.get("bad"),
        "index": lambda: cache["bad"],
        "read": lambda: cache.read("bad"),
        "in": lambda: "bad" in cache,
        "iterate": lambda: list(cache),
        "reversed": lambda: list(reversed(cache)),
        "iterkeys": lambda: list(cache.iterkeys()),
        "peekitem": lambda: cache.peekitem(),
        "peekitem_first": lambda: cache.peekitem(last=False),
        "peek": lambda: cache.peek(),
        "pop": lambda: cache.pop("bad"),
        "pull": lambda: cache.pull(),
        "incr": lambda: cache.incr("bad"),
        "add": lambda: cache.add("bad", 1),
        "touch": lambda: cache.touch("bad"),
        "set": lambda: cache.set("bad", 1),
        "check": lambda: cache.check(fix=True),
        "expire": lambda: cache.expire(),
        "evict": lambda: cache.evict("bad"),
        "cull": lambda: (
            cache.reset("eviction_policy", "least-recently-stored"), cache.reset("size_limit", 0), cache.cull()
        ),
        "delete": lambda: cache.delete("bad"),
        "clear": lambda: cache.clear(),
    }  # fmt: skip


@pytest.mark.parametrize("planted", ["value", "value_in_file", "key", "text_in_file", "incr_value"])
def test_a_planted_pickle_is_never_loaded(folder, bomb, ran, planted):
    key = key_bytes(folder, "bad")
    (folder / "planted.val").write_bytes(bomb)
    fields = {
        "value": {"key": key, "mode": 4, "value": bomb},
        "value_in_file": {"key": key, "mode": 4, "filename": "planted.val"},
        "key": {"key": bomb, "raw": 0, "mode": 4, "value": bomb},
        "text_in_file": {"key": key, "mode": 3, "filename": "planted.val"},
        "incr_value": {"key": key, "mode": 1, "value": bomb},  # not JSON either
    }[planted]
    refused = set()
    for expired in (False, True):
        plant(folder, **fields, expire_time=1.0 if expired else None, tag="bad")
        with open_cache(folder) as cache:
            for name in uses(cache):
                with open_cache(folder) as again:
                    try:
                        uses(again)[name]()
                    except UntrustedCacheError as error:
                        assert str(folder) in str(error) and "delete the folder" in str(error)
                        refused.add(name)
                    except (KeyError, TypeError, OSError, ValueError):
                        pass  # not there any more, or not a number
                assert not ran.exists(), name
    assert refused & ({"iterate"} if planted == "key" else {"get"}), refused
    with open_cache(folder) as cache:
        assert cache.get("good") in (None, [1, 2, 3])  # some of the uses remove what is there


def test_what_is_planted_here_would_run_with_diskcache_as_it_is(folder, bomb, ran):
    import diskcache

    plant(folder, key=key_bytes(folder, "bad"), mode=4, value=bomb)
    plant(folder, key=bomb, raw=0, mode=1, value=b"")
    with diskcache.Cache(str(folder), disk=diskcache.JSONDisk) as cache:
        for use in (lambda: cache["bad"], lambda: list(cache)):
            with pytest.raises((TypeError, AttributeError)):  # what was loaded is no compressed JSON
                use()
            assert ran.exists()
            ran.unlink()


@pytest.mark.parametrize("name", ["../precious", "/{absolute}", "cache.db", "ab/cd/../../../precious"])
def test_files_that_are_not_the_caches_own_are_neither_read_nor_deleted(folder, tmp_path, name):
    import zlib

    precious = tmp_path / "precious"
    precious.write_bytes(zlib.compress(b'"secret"'))
    name = name.replace("/{absolute}", str(precious))
    plant(folder, key=key_bytes(folder, "bad"), mode=2, filename=name, expire_time=None)
    with open_cache(folder) as cache:
        for use in ("get", "pop"):
            with pytest.raises(UntrustedCacheError, match="said to be in the file"):
                uses(cache)[use]()
    plant(folder, key=key_bytes(folder, "worse"), mode=2, filename=name, expire_time=1.0)
    with open_cache(folder) as cache, pytest.raises(UntrustedCacheError):
        cache.expire()
    assert precious.exists() and (folder / "cache.db").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disk", "diskcache.Disk"), ("disk__directory", "/"), ("disk_min_file_size", "BOMB"), ("get", "x"),
        ("disk_pickle_protocol", "x"), ("sqlite_writable_schema", 1), ("sqlite_mmap_size; x", 1),
        ("sqlite_journal_mode", "x"), ("disk_compress_level", "BOMB"), ("_disk", 1), ("count", "BOMB"),
        ("disk_unknown", 1),
    ],
)  # fmt: skip
def test_planted_settings_are_refused(folder, bomb, ran, key, value):
    with sqlite3.connect(folder / "cache.db") as connection:
        connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, bomb if value == "BOMB" else value))
    connection.close()
    with pytest.raises(UntrustedCacheError, match="setting"):
        open_cache(folder)
    assert not ran.exists()


def test_settings_of_another_kind_of_cache_do_not_win(tmp_path, bomb, ran):
    import diskcache

    with diskcache.Cache(str(tmp_path / "other"), size_limit=2**20, cull_limit=3) as other:  # pickles
        other[("a", "tuple")] = {1, 2}
        other["text"] = "value"
    with open_cache(tmp_path / "other") as cache:
        assert type(cache.disk).__name__ == "TrustedDisk"
        assert (cache.eviction_policy, cache.cull_limit, cache.size_limit) == ("none", 0, SETTINGS["size_limit"])
        assert cache.get("text") is None  # another key than JSON's
        with pytest.raises(UntrustedCacheError):
            list(cache)


def test_a_damaged_database_is_said_to_be_one(folder):
    (folder / "cache.db").write_bytes(b"this is no database" * 100)
    for name in ("cache.db-wal", "cache.db-shm"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UntrustedCacheError, match="cannot be read"):
        open_cache(folder)


def start_writer(folder):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_killed_writer_leaves_a_cache_that_opens_and_reads(tmp_path):
    folder, total = tmp_path / "cache", 0
    for attempt in range(4):
        with start_writer(folder) as writer:
            for _ in range(10):
                last = int(writer.stdout.readline())
            time.sleep(0.013 * attempt)  # somewhere in the middle of a write
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
            last = int(rest[-1]) if rest else last
        with open_cache(folder) as cache:
            for number in range(last + 1):
                assert cache[str(number)] == {"number": number}
                if number % 3 == 0:
                    assert cache[f"large {number}"][1] == number
            for key in cache:  # also the entry that was being written, if it is there
                assert cache[key] is not None
            cache["after"] = attempt
            assert cache["after"] == attempt
            total += last
    assert total > 30


def work(folder, name, count):
    with open_cache(folder) as cache:
        for number in range(count):
            cache[f"{name} {number}"] = [name] * (20000 if number % 10 == 0 else 3)
            assert cache[f"{name} {number}"][0] == name


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(tmp_path / "cache", name, 40)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with open_cache(tmp_path / "cache") as cache:
        assert len(cache) == 80 and cache.check() == []
