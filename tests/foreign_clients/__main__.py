"""`python -m tests.foreign_clients`: install them all; then `pytest tests/test_foreign_clients.py` needs no network."""

from tests.foreign_clients import NPM, npm_packages, runner


def main() -> None:
    for name in NPM:
        print(npm_packages(name))
    print(runner())


if __name__ == "__main__":
    main()
