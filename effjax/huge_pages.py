"""Memory in huge pages, for arrays that a CPU computes with.

A training step on a CPU takes its memory from the system and gives it back each time, and the system clears it page by
page: 160,000 of 4 KiB a step for a model of 11 million parameters, a sixth of the step's time. In pages of 2 MiB it is
hardly any. The C library asks for these if it was told so when the process started:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python ...
"""

import os
import sys
from pathlib import Path

_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
# The choices, the one in force in brackets: "always" leaves nothing to ask for, and with "never" it would be in vain.
_CHOICES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this program again in its place with that setting, where that makes a difference.

    It makes none where the kernel does not leave it to programs, or the user has settings of their own.
    """
    if _VARIABLE in os.environ or not _CHOICES.is_file() or "[madvise]" not in _CHOICES.read_text():
        return
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _VARIABLE: _SETTING}
    )
