"""models/base, models/adapter and prepared conversations in; models/merged, models/package and its proof out."""

from pathlib import Path

from fine_tuning.common.records import write_json
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.model_management.packaging.model_package import (
    PackageSettings,
    merge_adapter,
    prove_package,
    read_prepared,
    write_package,
)
from fine_tuning.model_management.packaging.quantisation_choice import choose_quantisation
from fine_tuning.runtime.base_model import BaseSettings
from fine_tuning.schema.chat_format import ChatSettings

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")
PACKAGE = Path("models/package")
TRAIN = Path("data/prepared/train")
CONVERSATIONS = Path("data/prepared/validation")
METRICS = Path("metrics/package.json")


def main() -> None:
    settings = read_params("package", PackageSettings)
    chat = read_params("chat", ChatSettings)
    converter = read_params("base", BaseSettings).gguf_converter
    print(f"package: merging the adapter into the base, in {settings.merged_dtype}", flush=True)
    merge_adapter(BASE, ADAPTER, MERGED, settings.merged_dtype)
    conversations, measured = read_prepared(CONVERSATIONS), {}
    if settings.quantisation == "auto":
        settings, measured = choose_quantisation(MERGED, PACKAGE, conversations, TRAIN, settings, chat, converter)
        for kind, found in measured.items():
            print(
                f"package: {kind:6} {found['bytes'] / 1e6:7.1f} MB, {found['tokens_per_second']:.0f} tokens/s, mean KL "
                f"{found['mean_kl']:.1e}, top-1 {found['top1']:.0%}, perplexity {found['perplexity_increase']:+.1%}"
            )
    print(f"package: writing {PACKAGE}/model.gguf in {settings.quantisation}, Modelfile and create.json", flush=True)
    write_package(BASE, ADAPTER, MERGED, PACKAGE, TRAIN, settings, chat, converter)
    print("package: proving that it says what was trained", flush=True)
    report = prove_package(BASE, ADAPTER, MERGED, PACKAGE, conversations, settings, chat)
    write_json(PACKAGE / "parity.json", report)
    write_json(
        METRICS,
        {
            "gguf_bytes": (PACKAGE / "model.gguf").stat().st_size,
            "merged_bytes": sum(file.stat().st_size for file in MERGED.glob("*.safetensors")),
            "merge_difference": report["merge"]["max_log_probability_difference"],
            "gguf_mean_kl": report["gguf"]["mean_kl"],
            "gguf_top1": report["gguf"]["top1"],
            "template_conversations": report["template"]["bank"] + report["template"]["real_prompts"],
            "tokenised_texts": report["tokens"]["conversations"] + report["tokens"]["odd_strings"],
            **({"adapter_gguf_mean_kl": report["adapter_gguf"]["mean_kl"]} if settings.adapter_gguf else {}),
            **({"quantisations": measured} if measured else {}),
        },
    )
    if left_out := report["template"]["left_out_for_tools"]:
        print(
            f"package: {left_out} prompts with results of tools left out: Ollama's templates cannot say this base's way"
        )
    print(
        f"package: proven. Mean KL {report['gguf']['mean_kl']:.1e} and top-1 {report['gguf']['top1']:.0%} against the "
        f"merged model, template exact on {report['template']['bank']} conversations"
    )


if __name__ == "__main__":
    run_stage(main)
