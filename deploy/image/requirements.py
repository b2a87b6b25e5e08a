"""Print what pyproject.toml asks for, the extras given included: `python requirements.py serve > requirements.txt`.

So the image installs the dependencies in a layer of their own, with no build of the project and no build tools.
`--metadata` prints the name and version that importlib.metadata looks for, as the project itself is only copied.
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
if sys.argv[1:] == ["--metadata"]:
    print(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}")
else:
    print(*project["dependencies"], sep="\n")
    for extra in sys.argv[1:]:
        print(*project["optional-dependencies"][extra], sep="\n")
