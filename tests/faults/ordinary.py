"""Commands as an ordinary user gives them: test_storage.py executes this with a list of them as JSON.

    python tests/faults/ordinary.py '[["HOME", "runs", "list"], …]'

Root passes over every permission, so this process gives up that right before anything else. Prints one JSON list:
what each command came to.
"""

import ctypes
import json
import os
import sys

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def give_up_passing_over_permissions() -> None:
    """What is taken from the bounding set is gone for what is executed from here on."""
    if os.geteuid() or "RETRACE_ORDINARY" in os.environ:
        return
    library = ctypes.CDLL(None, use_errno=True)
    for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if library.prctl(PR_CAPBSET_DROP, right, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "root could not give up its rights; execute the tests as another user")
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"RETRACE_ORDINARY": "1"})


def main(commands: list[list[str]]) -> None:
    import damage

    found = []
    for home, *words in commands:
        os.environ["RETRACE_HOME"] = home
        found.append(damage.command(*words))
    print(json.dumps(found))


if __name__ == "__main__":
    give_up_passing_over_permissions()
    main(json.loads(sys.argv[1]))
