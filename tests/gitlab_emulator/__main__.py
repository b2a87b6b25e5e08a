"""`python -m tests.gitlab_emulator --port 8929`: an emulated GitLab to rehearse against or to look at."""

import argparse
import os
import signal
from pathlib import Path

from tests.gitlab_emulator.rights import TIERS
from tests.gitlab_emulator.server import GitLabEmulator


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gitlab_emulator", description=__doc__)
    parser.add_argument("--port", type=int, default=8929, help="0 takes a free one (8929)")
    parser.add_argument("--project", default="g/proj", help="full path of the one project (g/proj)")
    parser.add_argument("--merge-request", type=int, default=3, help="iid of the open merge request (3)")
    parser.add_argument("--source-branch", default="experiment", help="its source branch (experiment)")
    parser.add_argument("--sha", help="its newest commit (a random one)")
    parser.add_argument("--tier", choices=TIERS, default="free", help="of the server's licence (free)")
    parser.add_argument("--gitlab", default="18.6", metavar="VERSION", help="which GitLab it is to be (18.6)")
    parser.add_argument(
        "--dump", type=Path, help="file to write all that was received to, as JSON, at the end"
    )
    arguments = parser.parse_args()
    # Tokens given by environment and not by flag: other users of the machine can read a command line.
    values = {"token": os.environ.get("REPO_TOKEN", ""), "job_token": os.environ.get("CI_JOB_TOKEN", "")}
    kind = {"tier": arguments.tier, "version": arguments.gitlab}
    gitlab = GitLabEmulator(arguments.port, path=arguments.project, **kind, **values)
    fields = {"source_branch": arguments.source_branch} | ({"sha": arguments.sha} if arguments.sha else {})
    gitlab.add_merge_request(arguments.merge_request, **fields)
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, ends
    )  # in the server's thread too, else one of these ends the process
    with gitlab:
        for name, value in gitlab.environment(arguments.merge_request, REPO_TOKEN=gitlab.token).items():
            print(f"export {name}='{value}'")
        print(f"# look at it: {gitlab.page_url(arguments.merge_request)}", flush=True)
        signal.sigwait(ends)
    if arguments.dump:
        gitlab.dump(arguments.dump)


if __name__ == "__main__":
    main()
