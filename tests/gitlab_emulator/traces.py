"""A job's log as a runner sends it and GitLab hands it out: sections, colours and, from runner 18.7 on, timestamps.

doc/ci/jobs/job_logs.md; the runner's timestamper: each line begins with its time to the microsecond, the stream's
number (00 the runner's own words, 01 the job's), O or E for output and errors, and `+` for a line that goes on, else a
blank. A mark of a section ends in a carriage return and an escape, and the line after it goes on.
"""

import re
from datetime import UTC, datetime, timedelta

from tests.gitlab_emulator.rights import number

STAMPED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [0-9a-f]{2}[OE][+ ]", re.MULTILINE)
STAMPS_SINCE = (18, 7)
CLEAR = "\x1b[0K"


def as_sent(words: str, runner: str, status: str = "success") -> str:
    """The whole log of a job whose commands wrote `words`. A log that is stamped already is as it is."""
    if STAMPED.search(words):
        return words
    failed = status == "failed"
    last = "\x1b[31;1mERROR: Job failed: exit code 1" if failed else "\x1b[32;1mJob succeeded"
    ends = last + "\x1b[0;m"
    begun = datetime(2026, 1, 21, 9, 47, 5, 94219, UTC)
    seconds = int(begun.timestamp())
    lines = [
        ("00O ", f"{CLEAR}Running with gitlab-runner {runner}.0 (3a5f2314)\x1b[0;m"),
        ("00O ", f"section_start:{seconds}:step_script\r{CLEAR}"),
        ("00O+", f'{CLEAR}\x1b[36;1mExecuting "step_script" stage of the job script\x1b[0;m\x1b[0;m'),
        *(("01O ", line) for line in words.splitlines()),
        ("00O ", f"section_end:{seconds}:step_script\r{CLEAR}"),
        ("00O+", f"{CLEAR}{ends}" if failed else f"{CLEAR}\x1b[0;m"),
        *([] if failed else [("00O ", ends)]),
    ]
    stamps = number(runner) >= STAMPS_SINCE
    return "".join(
        f"{stamp(begun + timedelta(milliseconds=place)) + ' ' + stream if stamps else ''}{text}"
        f"{'' if not stamps and text.endswith(CLEAR) else chr(10)}"
        for place, (stream, text) in enumerate(lines)
    )


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
