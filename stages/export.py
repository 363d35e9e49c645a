"""In: data/clean. Out: data/exports, a file a format; metrics/export.json."""

from pathlib import Path

from tqdm import tqdm

from fine_tuning.common.records import write_json
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.data_export import DataExporter, ExportSettings, read_clean

CLEAN = Path("data/clean")
EXPORTS = Path("data/exports")
METRICS = Path("metrics/export.json")


def main() -> None:
    settings = read_params("export", ExportSettings)
    exporter = DataExporter(EXPORTS, settings.compression)
    conversations = tqdm(read_clean(CLEAN), desc="exporting", unit="conversation", mininterval=0.5)
    paths = exporter.export_all_formats(conversations, settings.formats)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    write_json(METRICS, {name: counts | {"bytes": sizes[name]} for name, counts in exporter.counts.items()})


if __name__ == "__main__":
    run_stage(main)
