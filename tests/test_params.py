"""params.yaml: what is accepted, how everything that is not is reported, and presets."""

import copy
import io
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ml.errors import UserError
from ml.params import Params, apply_preset, load_params, parse_params

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "params.yaml").read_text()
TREE = YAML(typ="safe").load(TEXT)
KEYS = [(section, key) for section, values in TREE.items() for key in values]

# For each key one value of a wrong type and one out of its range.
BAD = {
    "load.dataset": (7, "cifar"),
    "preprocess.validation_fraction": ("a tenth", 1.0),
    "preprocess.split_seed": (1.0, -1),
    "model.channels": (16, [16, 32, 64]),
    "train.launcher": (["python"], "python; rm -rf ~"),
    "train.seeds": (0, []),
    "train.epochs": (True, 0),
    "train.batch_size": ("64", 0),
    "train.learning_rate": ("1e-3", 0.0),
    "train.betas": ({"first": 0.9}, [0.9, 1.0, 0.5]),
    "train.schedule": (None, "linear"),
    "train.warmup_fraction": (True, 1.0),
    "train.label_smoothing": ("none", -0.1),
    "train.shift_pixels": (1.5, 9),
    "train.log_every": (None, 0),
    "train.checkpoint_seconds": ("5 s", -1.0),
    "train.device": (0, "tpu"),
    "train.precision": (32, "float16"),
    "train.threads": (1.5, 0),
    "evaluate.resamples": ("2000", 99),
    "evaluate.calibration_bins": (15.5, 1),
    "evaluate.worst_mistakes": (False, 401),
    "report.primary_metric": (1, None),  # any text may be a team's metric; compare names the known ones
    "report.margin": ("0.1 pp", -0.1),
    "report.assumed_seed_std": (None, 0.0),
    "report.when_undecided": (True, "maybe"),
    "report.sheet_examples": (2.5, 0),
}


def with_value(section: str, key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    tree[section][key] = value
    return tree


def with_line(key: str, value: str, text: str = TEXT) -> str:
    """`text` with another value for `key`; the tests hold whatever values a team has in its params.yaml."""
    changed, count = re.subn(rf"(?m)^(  {key}: ).*$", lambda line: line[1] + value, text)
    assert count == 1
    return changed


def problems(tree: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(tree, "params.yaml", Params)
    return str(caught.value)


def load_text(path: Path, text: str) -> Params:
    path.write_text(text, encoding="utf-8")
    return load_params(path)


def dumped(tree: object) -> str:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, text)
    return text.getvalue()


def plain_tree(params: Params) -> dict[str, Any]:
    return params.model_dump()


# What is not accepted


def test_bad_values_are_known_for_every_key() -> None:
    assert set(BAD) == {f"{section}.{key}" for section, key in KEYS}


@pytest.mark.parametrize("section, key", KEYS)
def test_missing_key_is_named(section: str, key: str) -> None:
    tree = copy.deepcopy(TREE)
    del tree[section][key]
    message = problems(tree)
    assert f"{section}.{key}: is missing" in message and "has 1 problem;" in message


@pytest.mark.parametrize("section", TREE)
def test_missing_section_and_unknown_keys_are_named(section: str) -> None:
    assert f"  {section}: is missing" in problems({key: TREE[key] for key in TREE if key != section})
    assert f"  {section}.lerning_rate: is not a known key" in problems(with_value(section, "lerning_rate", 1))
    assert f"  {section}s: is not a known key" in problems(TREE | {f"{section}s": {}})


@pytest.mark.parametrize("key", BAD)
@pytest.mark.parametrize("which", [0, 1], ids=["type", "range"])
def test_bad_value_is_named_with_what_was_found(key: str, which: int) -> None:
    section, name = key.split(".")
    value = BAD[key][which]
    message = problems(with_value(section, name, value))
    assert f"  {key}: " in message and f"(found: {value!r})" in message
    assert "has 1 problem;" in message


@pytest.mark.parametrize("which", [0, 1], ids=["type", "range"])
def test_all_problems_are_listed_at_once(which: int) -> None:
    tree: dict[str, Any] = {section: {} for section in TREE}
    for key, values in BAD.items():
        section, name = key.split(".")
        tree[section][name] = values[which]
    tree["extra"] = 1
    message = problems(tree)
    for key in [*BAD, "extra"]:
        assert f"\n  {key}: " in message
    assert f"has {len(BAD) + 1} problems;" in message


def test_bad_element_of_a_list_is_named_by_its_position() -> None:
    assert "  model.channels.1: " in problems(with_value("model", "channels", [16, 0]))
    assert "  train.betas.0: " in problems(with_value("train", "betas", [1.0, 0.9]))
    assert "  train.seeds.2: " in problems(with_value("train", "seeds", [0, 1, True]))
    assert "  train.seeds.0: " in problems(with_value("train", "seeds", [2**32]))


def test_equal_seeds_are_listed_with_the_other_problems_under_their_key() -> None:
    tree = with_value("train", "seeds", [3, 1, 3])
    assert "  train.seeds: " in problems(tree) and "[3, 1, 3]" in problems(tree)
    tree["train"]["epochs"] = 0
    assert "  train.seeds: " in problems(tree) and "  train.epochs: " in problems(tree)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("section, key", [key for key in KEYS if isinstance(TREE[key[0]][key[1]], float)])
def test_number_that_is_not_finite_is_refused(section: str, key: str, value: float) -> None:
    assert f"{section}.{key}: " in problems(with_value(section, key, value))


@pytest.mark.parametrize(
    "launcher", ["", "python ", "python\n", "python -m x", "torchrun $(x)", "torchrun a&b", "sh"]
)
def test_launcher_that_a_shell_would_read_otherwise_is_refused(launcher: str) -> None:
    assert "train.launcher: " in problems(with_value("train", "launcher", launcher))


def test_long_value_is_cut_in_the_message() -> None:
    assert len(problems(with_value("load", "dataset", "x" * 10_000))) < 400


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "found nothing"),
        ("# only a comment\n", "found nothing"),
        ("- load\n", "found list"),
        ("just words\n", "found str"),
        ("load: [\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \0\n", "not valid YAML"),
        (TEXT + "\nload:\n  dataset: digits\n", "duplicate key"),
        (with_line("epochs", "5\n  epochs: 6"), "duplicate key"),
        (with_line("epochs", "5.0"), "train.epochs: "),
        (with_line("epochs", "&anchor true"), "train.epochs: "),
        (with_line("epochs", "2024-13-45"), "not valid YAML"),
        (with_line("epochs", "!!int five"), "not valid YAML"),
        (with_line("epochs", "1" + 5000 * "0"), "not valid YAML"),
        (with_line("epochs", "!other 5"), "train.epochs: "),
        (with_line("epochs", "&loop [*loop]"), "train.epochs: "),
        (with_line("learning_rate", ".nan"), "train.learning_rate: "),
        (with_line("learning_rate", ".inf"), "train.learning_rate: "),
        (700 * "[", "not valid YAML"),
        (TEXT + "7: 8\n", "7: Keys should be strings"),
        (TEXT + "? [a, b]\n: 8\n", "Keys should be strings"),
    ],
)
def test_file_that_does_not_fit_is_a_user_error(tmp_path: Path, text: str, found: str) -> None:
    assert text != TEXT
    with pytest.raises(UserError) as caught:
        load_text(tmp_path / "params.yaml", text)
    assert found in str(caught.value) and str(tmp_path / "params.yaml") in str(caught.value)


def test_file_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing. Run from the root"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="folder"):
        (tmp_path / "folder").mkdir()
        load_params(tmp_path / "folder")
    (tmp_path / "params.yaml").write_bytes(b"load: \xff\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def junk() -> st.SearchStrategy[Any]:
    text = st.text("aé0.:- \n", max_size=5)
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats() | text | st.binary(max_size=3) | st.dates()
    )
    words = st.sampled_from(sorted({*TREE, *(key for _, key in KEYS)}))
    keys = words | text | st.integers() | st.none() | st.tuples(st.integers())
    return st.recursive(leaves, lambda child: st.lists(child) | st.dictionaries(keys, child), max_leaves=8)


@settings(max_examples=30)
@given(junk())
@example({"train": {"learning_rate": 10**400}})
@example({"load": {"dataset": "\ud800"}})
def test_junk_is_never_anything_but_a_user_error(tree: object) -> None:
    with pytest.raises(UserError):
        parse_params(tree, "junk", Params)


@settings(max_examples=50)
@given(st.sampled_from(KEYS), junk())
def test_junk_as_one_value_is_accepted_or_named(key: tuple[str, str], value: object) -> None:
    try:
        parse_params(with_value(*key, value), "junk", Params)
    except UserError as error:
        assert ".".join(key) in str(error)


@settings(max_examples=40)
@given(
    st.integers(0, len(TEXT) - 1),
    st.text("abc019:-[]{}&*!|>'\"%@`#?, \n\t~<.\0é", max_size=4),
    st.integers(0, 4),
)
def test_damaged_file_is_never_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, where: int, inserted: str, removed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    try:
        load_text(path, TEXT[:where] + inserted + TEXT[where + removed :])
    except UserError as error:
        assert "damaged.yaml" in str(error)


# What is accepted


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = with_line("epochs", "0o12", with_line("learning_rate", "1e-3"))
    params = load_text(tmp_path / "params.yaml", text)
    assert params.train.learning_rate == 0.001 and params.train.epochs == 10


def test_whole_number_is_accepted_for_a_fraction_of_the_same_value(tmp_path: Path) -> None:
    params = load_text(tmp_path / "params.yaml", with_line("warmup_fraction", "0"))
    assert params.train.warmup_fraction == 0


def test_params_cannot_be_changed_after_loading() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.train.epochs = 1  # type: ignore[misc]


def open_fraction() -> st.SearchStrategy[float]:
    return st.floats(0, 1, exclude_min=True, exclude_max=True)


VALID = st.fixed_dictionaries(
    {
        "load": st.fixed_dictionaries(
            {"dataset": st.sampled_from(["mnist", "fashion-mnist", "kmnist", "digits", "custom"])}
        ),
        "preprocess": st.fixed_dictionaries(
            {"validation_fraction": open_fraction(), "split_seed": st.integers(0, 2**70)}
        ),
        "model": st.fixed_dictionaries({"channels": st.lists(st.integers(1, 2**40), min_size=2, max_size=2)}),
        "train": st.fixed_dictionaries(
            {
                "launcher": st.just("python")
                | st.from_regex(r"torchrun( [A-Za-z0-9_./:=-]+){0,12}", fullmatch=True),
                "seeds": st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5, unique=True),
                "epochs": st.integers(1),
                "batch_size": st.integers(1),
                "learning_rate": st.floats(0, 10, exclude_min=True),
                "betas": st.lists(open_fraction(), min_size=2, max_size=2),
                "schedule": st.sampled_from(["constant", "triangular", "cosine"]),
                "warmup_fraction": st.floats(0, 1, exclude_max=True),
                "label_smoothing": st.floats(0, 1, exclude_max=True),
                "shift_pixels": st.integers(0, 8),
                "log_every": st.integers(1),
                "checkpoint_seconds": st.floats(0, allow_infinity=False),
                "device": st.sampled_from(["auto", "cpu", "cuda"]),
                "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
                "threads": st.integers(1),
            }
        ),
        "evaluate": st.fixed_dictionaries(
            {
                "resamples": st.integers(100),
                "calibration_bins": st.integers(2, 100),
                "worst_mistakes": st.integers(1, 400),
            }
        ),
        "report": st.fixed_dictionaries(
            {
                "primary_metric": st.sampled_from(["accuracy", "macro_f1", "loss"]),
                "margin": st.floats(0, allow_infinity=False),
                "assumed_seed_std": st.floats(0, exclude_min=True, allow_infinity=False),
                "when_undecided": st.sampled_from(["pass", "block"]),
                "sheet_examples": st.integers(1, 200),
            }
        ),
    }
)


@settings(max_examples=30)
@given(VALID)
def test_valid_params_load_equal_from_yaml(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    loaded = load_text(tmp_path_factory.getbasetemp() / "valid.yaml", dumped(tree))
    assert plain_tree(loaded) == tree


# The command


def test_command_exits_1_and_lists_the_problems_without_a_traceback(
    workplace: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = with_line("epochs", "0").replace("  threads: ", "  treads: ")
    (workplace / "params.yaml").write_text(text)
    answer = run_python("-m", "ml.params")
    assert answer.returncode == 1 and answer.stdout == ""
    for key in ("train.epochs: ", "train.threads: is missing", "train.treads: is not a known key"):
        assert key in answer.stderr
    assert "Traceback" not in answer.stderr


def test_command_accepts_the_committed_file_and_applies_a_preset(
    workplace: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert run_python("-m", "ml.params").returncode == 0
    answer = run_python("-m", "ml.params", "--preset", "presets/essay.yaml")
    assert answer.returncode == 0 and "presets/essay.yaml" in answer.stderr
    assert load_params().train.seeds == [0]


# Presets


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "presets").iterdir()))
def test_preset_gives_its_values_and_keeps_the_others(workplace: Path, preset: str) -> None:
    before = plain_tree(load_params())
    applied = apply_preset(Path("presets", preset))
    overrides = YAML(typ="safe").load(Path("presets", preset))
    for section, key in KEYS:
        expected = overrides.get(section, {}).get(key, before[section][key])
        assert plain_tree(applied)[section][key] == expected, f"{section}.{key}"
    assert load_params() == applied


def test_essay_preset_is_the_essays_training(workplace: Path) -> None:
    train = apply_preset(Path("presets/essay.yaml")).train
    assert (train.learning_rate, train.batch_size, train.epochs, train.schedule) == (0.01, 64, 1, "constant")
    assert (train.seeds, train.betas) == ([0], [0.9, 0.999])
    assert (train.warmup_fraction, train.label_smoothing, train.shift_pixels) == (0, 0, 0)


def test_preset_changes_only_the_lines_of_its_keys(workplace: Path) -> None:
    before = Path("params.yaml").read_text().splitlines()
    overrides = YAML(typ="safe").load(Path("presets/essay.yaml"))
    apply_preset(Path("presets/essay.yaml"))
    after = Path("params.yaml").read_text().splitlines()
    assert len(after) == len(before)
    keys = {key for section in overrides.values() for key in section}
    for old, new in zip(before, after):
        assert old.partition("#")[2] == new.partition("#")[2]
        assert old == new or old.strip().partition(":")[0] in keys


def test_preset_does_not_break_a_long_value_over_lines(workplace: Path) -> None:
    launcher = "torchrun " + " ".join(f"--option-{number}=value" for number in range(12))
    Path("preset.yaml").write_text(f"train:\n  launcher: {launcher}\n")
    lines = len(Path("params.yaml").read_text().splitlines())
    assert apply_preset(Path("preset.yaml")).train.launcher == launcher
    assert len(Path("params.yaml").read_text().splitlines()) == lines
    assert load_params().train.launcher == launcher


@pytest.mark.parametrize(
    "text, found",
    [
        ("train:\n  epochs: 0\n", "train.epochs"),
        ("train:\n  epoch: 1\n", "train.epoch: is not a known key"),
        ("training:\n  epochs: 1\n", "training is not a section"),
        ("1:\n  epochs: 1\n", "1 is not a section"),
        ("epochs: 1\n", "expected sections"),
        ("train:\n", "expected sections"),
        ("", "expected sections"),
        ("[", "not valid YAML"),
    ],
)
def test_preset_that_gives_something_invalid_leaves_the_file_unchanged(
    workplace: Path, text: str, found: str
) -> None:
    before = Path("params.yaml").read_bytes()
    Path("preset.yaml").write_text(text)
    with pytest.raises(UserError, match=found):
        apply_preset(Path("preset.yaml"))
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.parametrize("text", ["", "words\n", "- list\n", "train: 5\n"])
def test_preset_on_a_file_without_sections_is_a_user_error(workplace: Path, text: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError, match="params.yaml"):
        apply_preset(Path("presets/essay.yaml"))
    assert Path("params.yaml").read_text() == text


def test_preset_leaves_the_file_unchanged_when_the_disk_is_full(
    workplace: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before, files = Path("params.yaml").read_bytes(), sorted(path.name for path in workplace.iterdir())
    program = (
        "import resource; from ml import errors, params\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "errors.exit_on_user_error(lambda: params.apply_preset(Path('presets/essay.yaml')))\n"
    )
    answer = run_python("-B", "-c", program)
    assert answer.returncode == 1
    assert Path("params.yaml").read_bytes() == before
    assert sorted(path.name for path in workplace.iterdir()) == files
    assert "Traceback" not in answer.stderr and "params.yaml" in answer.stderr
