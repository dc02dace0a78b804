"""reasoning-gym in a process of its own: `python reasoning_gym_worker.py`, started by lib.tasks.reasoning_gym.

It imports nothing of ours, so that any interpreter that has reasoning-gym can run it. One JSON object a line comes in,
and one goes out:

    {"do": "draw", "generator": "basic_arithmetic", "config": "{\\"seed\\": 42}", "index": 0, "seconds": 120}
    {"question": "Calculate -5 * -6.", "answer": "30", "template": "", "worked": ""}
    {"do": "score", …, "answer": "30", "seconds": 20}
    {"score": 1.0}

What reasoning-gym prints itself goes nowhere. A request that takes longer than its `seconds` ends the process, by
SIGALRM, which no endless loop can hold back, and which comes even when nobody waits any more.

Some verifiers evaluate the answer as a Python expression (eval, or sympy's parse_expr). An answer is the text of a
model, and no program: while one is judged, opening a file to write, a socket, a process and all else that Python
audits and that is not in HARMLESS is refused. That is a guard against an accident, not a prison.
"""

import importlib.metadata
import json
import os
import random
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import lru_cache

MEMORY = 4 << 30  # bytes: an answer such as 9**9**9**9 must not take the whole machine
HARMLESS = {"compile", "exec", "import", "marshal.loads", "object.__getattr__", "sys._getframe", "os.listdir"}
START_SECONDS = 120

judging = False


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    signal.alarm(START_SECONDS)
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    requests, replies = private_pipes()
    # this folder holds a reasoning_gym.py that is not the package
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    sys.addaudithook(refuse_deeds)
    reply(replies, hello())
    for line in requests:
        request = json.loads(line)
        signal.alarm(request.pop("seconds"))
        reply(replies, ANSWERS[request.pop("do")](**request))


def private_pipes():
    """The two pipes for ourselves alone: standard input is empty from now on, and standard output leads nowhere."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return requests, replies


def reply(replies, message):
    print(json.dumps(message), file=replies, flush=True)
    signal.alarm(0)


def refuse_deeds(event, arguments):
    if not judging or event in HARMLESS:
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return
    raise PermissionError(f"an answer must not do {event}")


def hello():
    try:
        version = importlib.metadata.version("reasoning_gym")
    except importlib.metadata.PackageNotFoundError:
        return {"absent": True}
    try:
        import reasoning_gym.factory  # noqa: F401
    except Exception as error:
        return {"error": f"reasoning-gym {version} cannot be imported: {told(error)}"}
    return {"version": version, "hash_randomization": sys.flags.hash_randomization}


def generators():
    from reasoning_gym.factory import DATASETS

    return {"generators": sorted(DATASETS)}


def options(generator):
    """The options of a generator, with their defaults as Python writes them."""
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        return {"error": f"reasoning-gym has no generator {generator!r}", "generators": sorted(DATASETS)}
    return {"options": {field.name: default_of(field) for field in fields(DATASETS[generator][1])}}


def default_of(field):
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return "required" if default is MISSING else repr(default)


def draw(generator, config, index):
    try:
        dataset(generator, config)
    except Exception as error:
        return {"refused": told(error)}
    try:
        entry = entry_of(generator, config, index)
    except Exception as error:
        return {"failed": told(error)}
    return {
        "question": entry["question"],
        "answer": entry["answer"],
        "template": str(getattr(dataset(generator, config), "task_indices", {index: ""})[index]),
        "worked": entry["metadata"].get("answer_cot", ""),
    }


def score(generator, config, index, answer):
    global judging

    gym, entry = dataset(generator, config), entry_of(generator, config, index)
    try:
        judging = True
        value = float(gym.score_answer(answer, entry))
    except Exception as error:
        return {"failed": told(error)}
    finally:
        judging = False
    return {"score": value}


@lru_cache(maxsize=2)
def dataset(generator, config):
    from reasoning_gym.factory import create_dataset

    seed_all()
    return create_dataset(generator, **json.loads(config))


@lru_cache(maxsize=2)
def entry_of(generator, config, index):
    seed_all()
    return dataset(generator, config)[index]


def seed_all():
    """For what draws from the global sources: an entry must not depend on those drawn before."""
    import numpy

    random.seed(0)
    numpy.random.seed(0)


def told(error):
    """The error in one line of a size that can be shown."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


ANSWERS = {"generators": generators, "options": options, "draw": draw, "score": score}

if __name__ == "__main__":
    main()
