"""In: data/clean. Out: data/exports, a folder a format with a file for each of data/clean; metrics/export.json."""

from pathlib import Path

from tqdm import tqdm

from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import write_json
from fine_tuning.common.results import Memo
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.data_export import ExportSettings, clean_files, export_shards

CLEAN = Path("data/clean")
EXPORTS = Path("data/exports")
METRICS = Path("metrics/export.json")
MEMO = Path(".whetstone/memo/export")


def main() -> None:
    settings, memo = read_params("export", ExportSettings), Memo(main_checkout() / MEMO, "export")
    with tqdm(desc="exporting", unit=" shards", leave=False, disable=None) as bar:
        counts = export_shards(clean_files(CLEAN), EXPORTS, memo, settings, bar.update)
    write_json(METRICS, counts)


if __name__ == "__main__":
    run_stage(main)
