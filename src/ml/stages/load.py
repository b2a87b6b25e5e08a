"""load: decode and check the raw files, give each example an id, write the data card."""

from typing import Any

from ml import files
from ml.cost import measured
from ml.errors import exit_on_user_error
from ml.examples import describe
from ml.params import load_params
from ml.task.dataset import read_dataset


def data_card(summary: dict[str, Any]) -> str:
    """The summary as Markdown, for people."""
    train, test = summary["train"], summary["test"]
    rows = [
        f"| {name} | {train['per_class'][name]:,} | {test['per_class'][name]:,} |"
        for name in summary["class_names"]
    ]
    hashes = [f"| `{file}` | `{md5}` |" for file, md5 in summary["md5"].items()]
    return "\n".join(
        [
            f"# Data: {summary['dataset']}",
            "",
            f"{train['examples']:,} training and {test['examples']:,} test images of "
            f"{summary['image_height']}×{summary['image_width']} pixels, {len(summary['class_names'])} classes.",
            "",
            f"- Repeated images: {train['repeated_images']:,} in the training part, {test['repeated_images']:,} in the test part.",
            f"- Images in both parts (a leak): {summary['images_in_both_parts']:,}.",
            f"- Pixels of the training part on 0..1: mean {train['pixel_mean']:.4f}, standard deviation {train['pixel_std']:.4f}.",
            "",
            "| class | training | test |",
            "|---|---:|---:|",
            *rows,
            "",
            "| file | MD5 |",
            "|---|---|",
            *hashes,
            "",
        ]
    )


def main() -> None:
    with measured("load"):
        params = load_params().load
        dataset = read_dataset(files.DATA, params.dataset)
        summary = describe(dataset, params.dataset)
        files.save_examples(files.TRAIN_EXAMPLES, dataset.train)
        files.save_examples(files.TEST_EXAMPLES, dataset.test)
        files.write_json(files.DATA_SUMMARY, summary)
        files.write_text(files.DATA_CARD, data_card(summary))


if __name__ == "__main__":
    exit_on_user_error(main)
