import os
import subprocess
import sys

import pytest

from effjax import huge_pages

PROGRAM = """
import os, pathlib, sys
from effjax import huge_pages
huge_pages._CHOICES = pathlib.Path(sys.argv[1])
print("start", os.getpid(), flush=True)
huge_pages.restart()
print("end", sys.argv[2], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.parametrize(
    ("choices", "given", "starts", "setting"),
    [
        ("always [madvise] never", None, 2, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=0", 1, "glibc.malloc.check=0"),
        ("[always] madvise never", None, 1, "None"),
        (None, None, 1, "None"),
    ],
)
def test_a_program_starts_again_where_the_kernel_leaves_it_to_programs(
    tmp_path, choices, given, starts, setting
):
    file = tmp_path / "enabled"
    if choices is not None:
        file.write_text(choices)
    environment = {k: v for k, v in os.environ.items() if k != huge_pages._VARIABLE}
    if given is not None:
        environment[huge_pages._VARIABLE] = given
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, file, "two words"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *started, ended = run.stdout.splitlines()
    assert len(started) == starts and len(set(started)) == 1  # the same process
    assert ended == f"end two words {setting}"
