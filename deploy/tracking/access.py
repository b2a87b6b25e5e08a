"""Users of the tracking server and their roles (roles.json). Run by an administrator; needs nothing but Python.

    python access.py list
    python access.py add ann --role data-scientist    # prints a new password, once
    python access.py role ann releaser                # takes the other roles away
    python access.py password ann                     # a new one, printed once; the old one no longer works
    python access.py remove ann

Reads MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of the administrator, and
REQUESTS_CA_BUNDLE where the certificate is signed by an authority of your own.
"""

import argparse
import base64
import json
import os
import secrets
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

NEEDED = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
WORKSPACE = "default"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python access.py", description="Users of the tracking server.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every user with roles")
    texts = {"add": "a new user", "role": "another role", "password": "a new password", "remove": "take away"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("user")
        if name == "add":
            command.add_argument("--role", required=True)
        if name == "role":
            command.add_argument("role")
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        sys.exit(f"error: {', '.join(missing)} not set: the server's address and an administrator's login.")
    if arguments.command == "list":
        list_users()
    elif arguments.command == "add":
        role = role_id(arguments.role)  # before the user is made: a wrong name leaves nothing behind
        password = secrets.token_urlsafe(24)
        ask("POST", "2.0", "users/create", username=arguments.user, password=password)
        ask("POST", "3.0", "roles/assign", username=arguments.user, role_id=role)
        print(password)
    elif arguments.command == "role":
        set_role(arguments.user, role_id(arguments.role))
    elif arguments.command == "password":
        password = secrets.token_urlsafe(24)
        ask("PATCH", "2.0", "users/update-password", username=arguments.user, password=password)
        print(password)
    else:
        ask("DELETE", "2.0", "users/delete", username=arguments.user)


def ask(method: str, version: str, route: str, **values: Any) -> Any:
    """The server's answer. Ends the process with its words when it refuses."""
    url = f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api/{version}/mlflow/{route}"
    login = f"{os.environ['MLFLOW_TRACKING_USERNAME']}:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    body = None
    if method == "GET":
        url += "?" + urllib.parse.urlencode(values)
    else:
        body, headers["Content-Type"] = json.dumps(values).encode(), "application/json"
    context = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        sys.exit(f"error: the server refused ({error.code}): {error.read(2000).decode(errors='replace')}")
    except (urllib.error.URLError, OSError) as error:
        sys.exit(f"error: {os.environ['MLFLOW_TRACKING_URI']} cannot be asked: {error}")


def roles() -> dict[str, int]:
    """Id of each role; MLflow's own, one for each user's single grants, begin with __."""
    answer = ask("GET", "3.0", "roles/list", workspace=WORKSPACE)["roles"]
    return {role["name"]: role["id"] for role in answer if not role["name"].startswith("__")}


def role_id(name: str) -> int:
    there = roles()
    if name not in there:
        sys.exit(f"error: there is no role {name!r} (there are: {', '.join(sorted(there))}).")
    return there[name]


def list_users() -> None:
    users: dict[Any, list[str]] = {}
    for name, number in roles().items():
        for each in ask("GET", "3.0", "roles/users/list", role_id=number)["assignments"]:
            users.setdefault(each["user_id"], []).append(name)
    for user in ask("GET", "2.0", "users/list")["users"]:
        what = (
            "administrator" if user["is_admin"] else ", ".join(sorted(users.get(user["id"], []))) or "no role"
        )
        print(f"{user['username']}\t{what}")


def set_role(user: str, wanted: int) -> None:
    answer = ask("GET", "3.0", "users/roles/list", username=user)["roles"]
    has = {role["id"] for role in answer if not role["name"].startswith("__")}
    if wanted not in has:
        ask("POST", "3.0", "roles/assign", username=user, role_id=wanted)
    for other in has - {wanted}:
        ask("DELETE", "3.0", "roles/unassign", username=user, role_id=other)


if __name__ == "__main__":
    main()
