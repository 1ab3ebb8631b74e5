"""The command ``cyclegan-fast``: arguments in, calls of the package, exit status out.

Exit status: 0 done; 1 done but for some files, which are listed; 2 wrong input (arguments, configuration, data,
checkpoint); 3 the training blew up, or its processes came to differ; 4 another process of the training ended or hangs,
or this one hung; 130 and 143 stopped by SIGINT or SIGTERM with everything saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cyclegan_fast.config import Config, ConfigError, load_config, reference_page, to_yaml
from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.version import __version__

if TYPE_CHECKING:
    from PIL import Image

# torch takes seconds to import; each command imports what it needs, so that help and mistakes answer at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    level = logging.INFO if _is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    try:
        status: int = arguments.run(arguments)
    except InputError as error:
        print(f"cyclegan-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cyclegan-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _is_main() -> bool:
    """Whether this process speaks to the user: under torchrun the first, and asked before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cyclegan-fast", description="Train and use a CycleGAN, fast.")
    parser.add_argument("--version", action="version", version=f"cyclegan_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_translate(commands)
    _add_figures(commands)
    _add_report(commands)
    _add_evaluate(commands)
    _add_data(commands)
    _add_export(commands)
    _add_weights(commands)
    _add_demo(commands)
    doctor = commands.add_parser("doctor", help="say what this machine and this installation can do")
    doctor.add_argument(
        "--measure",
        nargs="?",
        const="auto",
        metavar="DEVICE",
        help="first measure how fast DEVICE (auto, cpu, cuda or cuda:N; default auto) multiplies and copies, which "
        "takes seconds, and keep that: training then shows what share of it is reached",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a CycleGAN",
        description="Train as a YAML file and section.field=value overrides say; under torchrun on several processes.",
    )
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings beside the file's")
    train.add_argument("--config", metavar="FILE", help="YAML file, see configs/")
    train.add_argument(
        "--from-options",
        metavar="FILE",
        help="train as the train_opt.txt of the de-facto implementation says, which the overrides may change",
    )
    train.add_argument("--print", action="store_true", help="print the settings as YAML, and stop")
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue the run of this configuration, or that of the run folder RUN; starts one if there is none",
    )
    train.add_argument("--help-config", action="store_true", help="list every setting with its meaning, and stop")
    train.set_defaults(run=_train)


def _add_translate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    translate = commands.add_parser(
        "translate",
        help="translate pictures with a trained model",
        description="Translate files, folders and glob patterns; size and metadata are kept. Goes on past a bad file.",
    )
    translate.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run folder, checkpoint file, or de-facto weights (folder or file)"
    )
    translate.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder or glob pattern")
    translate.add_argument("-o", "--out", required=True, metavar="DIR", help="folder for the results")
    translate.add_argument("--direction", choices=("AtoB", "BtoA"), default="AtoB")
    translate.add_argument(
        "--seed", type=int, metavar="N", help="which of many translations, for Augmented CycleGAN (default 0)"
    )
    translate.add_argument(
        "--format", choices=("jpg", "png", "tif", "webp", "avif", "heic", "bmp"), help="default: the input's"
    )
    _add_output_options(translate)
    translate.add_argument("--suffix", default="", help="appended to each name, before the extension")
    translate.add_argument("--overwrite", action="store_true", help="replace results that exist")
    translate.add_argument(
        "--truncate", action="store_true", help="cut pixel values off instead of rounding, as the de-facto code does"
    )
    translate.add_argument(
        "--which",
        default="latest",
        help="checkpoint of a run: latest, best or epoch-N; of weights: latest, N or iter_N",
    )
    translate.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="averaged weights (see training.ema) or those of the last step; default: averaged if there are any",
    )
    translate.add_argument(
        "--unfamiliar",
        choices=("warn", "skip", "ignore"),
        default="warn",
        help="of pictures unlike the training pictures: say so, leave them out, or do not look (default warn)",
    )
    _add_size_options(translate)
    _add_execution_options(translate)
    translate.set_defaults(run=_translate)


def _add_size_options(translate: argparse.ArgumentParser) -> None:
    translate.add_argument(
        "--scale",
        metavar="N|train",
        help="translate at a short side of N pixels, or of the training's pictures, and return to full size with the "
        "picture's own detail; see docs/full_size.md",
    )
    translate.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="most that a translation may take beside the loaded model, such as 4GB: larger pictures are computed in "
        "bands, with the same result (default: what is free)",
    )
    translate.add_argument("--tile", type=int, metavar="ROWS", help="compute in bands of so many rows in any case")


def _add_output_options(translate: argparse.ArgumentParser) -> None:
    translate.add_argument("--quality", type=int, default=95, metavar="1..100", help="of lossy formats (default 95)")
    translate.add_argument(
        "--chroma",
        choices=("420", "422", "444"),
        help="resolution of colour (default: 444 for JPEG and AVIF, else 420)",
    )
    translate.add_argument("--lossless", action="store_true", help="of WebP and HEIC; PNG and TIFF always are")
    translate.add_argument(
        "--depth", choices=("8", "16", "same"), default="same", help="bits a channel (default: the input's)"
    )
    translate.add_argument(
        "--profile", choices=("srgb", "original"), default="srgb", help="colours of the results (default srgb)"
    )
    translate.add_argument(
        "--gray", choices=("keep", "model"), default="keep", help="gray pictures stay gray, or as the model has it"
    )
    translate.add_argument("--keep-times", action="store_true", help="give the results the files' times")


def _add_figures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    figures = commands.add_parser("figures", help="draw training curves and picture grids of a run")
    kinds = figures.add_subparsers(required=True, metavar="KIND")
    curves = kinds.add_parser("curves", help="the four networks' losses over the epochs")
    progress = kinds.add_parser("progress", help="input | generated after the given epochs (checkpoint.milestones)")
    pairs = kinds.add_parser("pairs", help="input | generated")
    cycle = kinds.add_parser("cycle", help="input | generated | reconstructed")
    for kind in (curves, progress, pairs, cycle):
        kind.add_argument("run_folder", metavar="RUN", help="run folder")
        kind.add_argument("-o", "--out", required=True, metavar="FILE", help="picture to write")
    for kind in (progress, pairs, cycle):
        kind.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures to translate")
        kind.add_argument("--direction", choices=("AtoB", "BtoA"), default="AtoB")
    for kind in (pairs, cycle):
        kind.add_argument("--which", default="latest", help="checkpoint of the run: latest, best or epoch-N")
    progress.add_argument("--epochs", default="1,10,50", help="comma-separated (default 1,10,50)")
    for kind in (progress, pairs, cycle):
        _add_execution_options(kind)
    curves.set_defaults(run=_figure_curves)
    progress.set_defaults(run=_figure_progress)
    pairs.set_defaults(run=_figure_pairs)
    cycle.set_defaults(run=_figure_cycle)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write a run as one HTML page to look at and to send",
        description="Write settings, curves, measures and pictures of a run as one HTML file that needs no network.",
    )
    report.add_argument("run_folder", metavar="RUN", help="run folder")
    report.add_argument("-o", "--out", metavar="FILE", help="page to write (default: RUN/report.html)")
    report.add_argument("--which", default="latest", help="checkpoint of the run: latest, best or epoch-N")
    report.add_argument("--data", metavar="DIR", help="the run's data set, if it has moved")
    report.add_argument(
        "--pictures", nargs="+", default=[], metavar="FILE", help="pictures for the sliders (default: test pictures)"
    )
    report.add_argument("--number", type=int, default=3, metavar="N", help="test pictures a direction (default 3)")
    report.add_argument("--quality", type=int, default=88, metavar="1..100", help="of the JPEGs in it (default 88)")
    report.add_argument(
        "--max-size", default="15MB", metavar="SIZE", help="pictures are shrunk to keep the page below (default 15MB)"
    )
    report.add_argument(
        "--evaluate",
        action=argparse.BooleanOptionalAction,
        help="measure the checkpoint first, as `cyclegan-fast evaluate` does (default: if nothing was measured yet)",
    )
    _add_execution_options(report)
    report.set_defaults(run=_report)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure how good a trained model is",
        description="Measure a model on test pictures, with confidence intervals: a table on standard output, and "
        "evaluation.json in the run folder. See docs/evaluation.md.",
    )
    evaluate.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run folder, checkpoint file, or de-facto weights (folder or file)"
    )
    evaluate.add_argument(
        "--data",
        metavar="DIR",
        help="folder with testA and testB (default: the pictures that the run was trained with)",
    )
    evaluate.add_argument("--split", choices=("test", "train"), default="test", help="which pictures (default test)")
    evaluate.add_argument("--pairs", action="store_true", help="pictures of one name in A and B are pairs")
    evaluate.add_argument("--limit", type=int, metavar="N", help="measure a random N pictures of each domain")
    evaluate.add_argument("--direction", choices=("AtoB", "BtoA"), help="this one only (default: all the model has)")
    evaluate.add_argument(
        "--which",
        default="latest",
        help="checkpoint of a run: latest, best or epoch-N; of weights: latest, N or iter_N",
    )
    evaluate.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="averaged weights if there are any, or not"
    )
    evaluate.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="JSON file to write (default: RUN/evaluation.json; none with --limit, --split train or --direction)",
    )
    evaluate.add_argument(
        "--format", choices=("text", "json", "markdown"), default="text", help="of standard output (default text)"
    )
    evaluate.add_argument(
        "--fid", action="store_true", help='also FID and KID; needs pip install "cyclegan_fast[fid]" and weights'
    )
    evaluate.add_argument(
        "--inception-weights", metavar="FILE", help="torch-fidelity's Inception weights (default: its own download)"
    )
    evaluate.add_argument(
        "--embedding",
        metavar="random|FILE.pt2",
        help="the same distances in other features: of a random network, or of a torch.export program",
    )
    _add_execution_options(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_execution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto")


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="make or check data sets")
    kinds = data.add_subparsers(required=True, metavar="KIND")
    synth = kinds.add_parser("synth", help="render synthetic flowers: trainA, trainB, testA, testB and the truth")
    synth.add_argument("root", metavar="DIR")
    synth.add_argument("--train", type=int, default=200, help="training pictures a domain (default 200)")
    synth.add_argument("--test", type=int, default=24, help="test pictures a domain (default 24)")
    synth.add_argument("--size", type=int, default=128, help="side in pixels (default 128)")
    synth.add_argument("--seed", type=int, default=0)
    synth.set_defaults(run=_data_synth)
    scan = kinds.add_parser("scan", help="read every picture's header, report sizes, list unusable files")
    scan.add_argument("root", metavar="DIR", help="folder that holds trainA and trainB")
    scan.add_argument("--full", action="store_true", help="decode every picture, not only its header")
    scan.set_defaults(run=_data_scan)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a generator as a file that runs without this package",
        description="Write one direction's generator as ONNX or as a torch.export program, for any picture size, or as "
        "an ExecuTorch program for phones, for one size, and compare the file with the model.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint file")
    export.add_argument("-o", "--out", required=True, metavar="FILE", help="file to write, *.onnx, *.pt2 or *.pte")
    export.add_argument("--format", choices=("onnx", "pt2", "pte"), help="default: the file's suffix")
    export.add_argument("--direction", choices=("AtoB", "BtoA"), default="AtoB")
    export.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of weights and convolutions")
    export.add_argument("--uint8", action="store_true", help="uint8 [N, H, W, C] in and out, not float [N, C, H, W]")
    export.add_argument(
        "--size", type=_size, metavar="PIXELS", help="of the pictures that a *.pte takes: 512 or 640x480 (default 256)"
    )
    export.add_argument("--which", default="latest", help="checkpoint of a run: latest, best or epoch-N")
    export.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="run the file and compare its results with the model's (default: if what runs it is installed)",
    )
    export.set_defaults(run=_export)


def _size(text: str) -> tuple[int, int]:
    """(height, width) of `N`, a square, or `WIDTHxHEIGHT`."""
    sides = text.lower().split("x")
    if not (len(sides) <= 2 and all(side.isdecimal() for side in sides)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512 or 640x480")
    return int(sides[-1]), int(sides[0])


def _add_weights(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    weights = commands.add_parser(
        "weights",
        help="import, export and show weights of the de-facto implementation",
        description="SOURCE: a *_net_*.pth or .safetensors file, a folder of them, a run folder or a checkpoint.",
    )
    kinds = weights.add_subparsers(required=True, metavar="KIND")
    imported = kinds.add_parser("import", help="make a run folder, or a .ckpt file, of de-facto weights")
    imported.add_argument("source", metavar="SOURCE")
    imported.add_argument("-o", "--out", required=True, metavar="RUN", help="run folder, or file that ends in .ckpt")
    exported = kinds.add_parser("export", help="write networks as the de-facto implementation reads them")
    exported.add_argument("source", metavar="SOURCE")
    exported.add_argument("-o", "--out", required=True, metavar="DIR", help="folder for LABEL_net_G_A.pth and so on")
    exported.add_argument("--label", default="latest", help="epoch to call them: latest, N or iter_N (default latest)")
    exported.add_argument("--format", choices=("pth", "safetensors"), default="pth")
    exported.add_argument("--direction", choices=("AtoB", "BtoA"), help="this generator only, as LABEL_net_G.pth")
    exported.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="averaged weights if there are any, or not"
    )
    exported.add_argument("--overwrite", action="store_true", help="replace files that exist")
    show = kinds.add_parser("show", help="say what was recognised, and the settings of such networks")
    show.add_argument("source", metavar="SOURCE")
    for kind in (imported, exported, show):
        kind.add_argument("--which", default="latest", help="latest, N or iter_N; of a run latest, best or epoch-N")
    imported.set_defaults(run=_weights_import)
    exported.set_defaults(run=_weights_export)
    show.set_defaults(run=_weights_show)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="serve a local page to try a trained model",
        description="Serve a page where one drops a photograph and slides between before and after, at full size. "
        'Needs pip install "cyclegan_fast[demo]"; docs/demo.md.',
    )
    demo.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint file")
    demo.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes any that is free")
    demo.add_argument("--host", default="127.0.0.1", help="address to serve on (default 127.0.0.1: this machine only)")
    demo.add_argument("--which", default="latest", help="checkpoint of a run: latest, best or epoch-N")
    demo.add_argument("--max-upload", default="50MB", metavar="SIZE", help="largest file it takes (default 50MB)")
    demo.add_argument(
        "--max-megapixels", type=float, default=100.0, metavar="N", help="largest picture it takes (default 100)"
    )
    _add_execution_options(demo)
    demo.set_defaults(run=_demo)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.help_config:
        print(reference_page(), end="")
        return 0
    config, resume = _train_config(arguments)
    if _is_main():
        print(to_yaml(config), flush=True)
    if arguments.print:
        return 0

    from cyclegan_fast.heartbeat import LOST_STATUS, LostRankError
    from cyclegan_fast.training.health import NonFiniteLossError
    from cyclegan_fast.training.replicas import ReplicaError
    from cyclegan_fast.training.trainer import Interrupted, train

    try:
        run_dir = train(config, resume=resume)
    except Interrupted as stop:
        logging.info("%s", stop)
        return 128 + stop.signum
    except LostRankError:  # which was reported when it was noticed
        return LOST_STATUS
    except (NonFiniteLossError, ReplicaError) as error:
        print(f"cyclegan-fast: {error}", file=sys.stderr)
        return 3
    if _is_main():
        print(f"done: {run_dir}")
    return 0


def _train_config(arguments: argparse.Namespace) -> tuple[Config, bool]:
    """The configuration meant by the arguments, and whether to resume."""
    if arguments.from_options is not None:
        return _options_config(arguments), False
    if not arguments.resume:
        return load_config(arguments.config, arguments.overrides), arguments.resume is not None
    if "=" in arguments.resume:  # `--resume a.b=c`: argparse took the first override for the run folder
        return load_config(arguments.config, [arguments.resume, *arguments.overrides]), True
    run = Path(arguments.resume)
    if arguments.config is not None:
        raise ConfigError(f"--resume {run} takes the configuration from the run; leave out --config {arguments.config}")
    # Where the folder stands now counts, not where it stood when it was started.
    place = [f"name={run.resolve().name}", f"out={run.resolve().parent}"]
    return load_config(run / "config.yaml", [*place, *arguments.overrides]), True


def _options_config(arguments: argparse.Namespace) -> Config:
    """The configuration that a de-facto options file stands for; what it cannot take over is printed."""
    from cyclegan_fast.options_file import read_options

    if arguments.config is not None or arguments.resume is not None:
        raise ConfigError("--from-options stands in the place of --config, and begins a run: leave out the others")
    overrides, notes = read_options(arguments.from_options)
    for note in notes if _is_main() else ():
        logging.warning("%s: %s", shown(arguments.from_options), shown(note))
    return load_config(None, [*overrides, *arguments.overrides])


def _translate(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.files import translate_files
    from cyclegan_fast.inference.memory import parse_size
    from cyclegan_fast.inference.translate import load

    max_memory = None if arguments.max_memory is None else parse_size(arguments.max_memory)
    translator = load(
        arguments.checkpoint,
        which=arguments.which,
        device=arguments.device,
        precision=arguments.precision,
        weights=arguments.weights,
    )
    result = translate_files(
        translator if arguments.seed is None else translator.styled(arguments.seed),
        arguments.inputs,
        arguments.out,
        direction=arguments.direction,
        suffix=arguments.suffix,
        format=arguments.format,
        quality=arguments.quality,
        chroma=arguments.chroma,
        lossless=arguments.lossless,
        depth="same" if arguments.depth == "same" else int(arguments.depth),
        profile=arguments.profile,
        gray=arguments.gray,
        keep_times=arguments.keep_times,
        overwrite=arguments.overwrite,
        truncate=arguments.truncate,
        scale=_scale(arguments.scale),
        tile=arguments.tile,
        max_memory=max_memory,
        unfamiliar=arguments.unfamiliar,
    )
    print(f"{len(result.done)} pictures written to {arguments.out}")
    for path, reason in result.failed:
        print(f"not translated: {shown(path)}: {shown(reason)}", file=sys.stderr)
    return 1 if result.failed else 0


def _scale(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else text


def _figure_curves(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.figures import curves_figure

    curves_figure(Path(arguments.run_folder) / "scalars.jsonl", Path(arguments.out))
    print(arguments.out)
    return 0


def _figure_progress(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.figures import progress_figure

    try:
        epochs = [int(epoch) for epoch in arguments.epochs.split(",")]
    except ValueError:
        raise ConfigError(f"--epochs {arguments.epochs!r} is not a list of integers such as 1,10,50") from None
    figure = progress_figure(
        arguments.run_folder,
        epochs,
        arguments.inputs,
        arguments.direction,
        device=arguments.device,
        precision=arguments.precision,
    )
    return _keep_figure(figure, arguments.out)


def _figure_pairs(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.figures import translation_figure

    return _keep_figure(_one_model_figure(translation_figure, arguments), arguments.out)


def _figure_cycle(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.figures import cycle_figure

    return _keep_figure(_one_model_figure(cycle_figure, arguments), arguments.out)


def _one_model_figure(draw: Callable[..., Image.Image], arguments: argparse.Namespace) -> Image.Image:
    return draw(
        arguments.run_folder,
        arguments.which,
        arguments.inputs,
        arguments.direction,
        device=arguments.device,
        precision=arguments.precision,
    )


def _keep_figure(figure: Image.Image, out: str) -> int:
    from cyclegan_fast.data.photo import save_photo

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_photo(figure, Path(out))
    print(out)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.report.page import write_report
    from cyclegan_fast.inference.memory import parse_size

    out = write_report(
        arguments.run_folder,
        arguments.out,
        which=arguments.which,
        data=arguments.data,
        pictures=arguments.pictures,
        number=arguments.number,
        quality=arguments.quality,
        max_size=parse_size(arguments.max_size),
        evaluate=arguments.evaluate,
        device=arguments.device,
        precision=arguments.precision,
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.evaluation.evaluate import evaluate

    found = evaluate(
        arguments.checkpoint,
        arguments.data,
        which=arguments.which,
        directions=None if arguments.direction is None else (arguments.direction,),
        split=arguments.split,
        pairs=arguments.pairs,
        limit=arguments.limit,
        weights=arguments.weights,
        fid=arguments.fid,
        inception_weights=arguments.inception_weights,
        embedding=arguments.embedding,
        device=arguments.device,
        precision=arguments.precision,
        progress=True,
    )
    # First of all, as saving may fail: what was found took minutes.
    print({"text": found.table, "markdown": found.markdown, "json": found.json}[arguments.format](), flush=True)
    checkpoint = Path(arguments.checkpoint)
    in_part = arguments.limit is not None or arguments.split != "test" or arguments.direction is not None
    if arguments.out is not None:
        found.save(arguments.out)
    elif checkpoint.is_dir() and in_part:
        print(f"{checkpoint / 'evaluation.json'} is for whole evaluations: -o FILE keeps this one", file=sys.stderr)
    elif checkpoint.is_dir():
        found.save(checkpoint / "evaluation.json")
    for name, reason in found.data["left_out"]:
        print(f"left out: {shown(name)}: {shown(reason)}", file=sys.stderr)
    return 1 if found.data["left_out"] else 0


def _data_synth(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.data.synthetic import ensure_dataset

    root = ensure_dataset(
        Path(arguments.root),
        train=arguments.train,
        test=arguments.test,
        size=arguments.size,
        seed=arguments.seed,
        progress=True,
    )
    print(root)
    return 0


def _data_scan(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.data.folder import report, scan_dataset

    scans = scan_dataset(Path(arguments.root), unreadable="skip", full=arguments.full, progress=True)
    print(report(scans))
    return 1 if any(scan.bad for scan in scans.values()) else 0


def _export(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.export import export
    from cyclegan_fast.inference.translate import load

    exported = export(
        load(arguments.checkpoint, which=arguments.which, device="cpu", precision="fp32"),
        arguments.out,
        direction=arguments.direction,
        format=arguments.format,
        precision=arguments.precision,
        uint8=arguments.uint8,
        size=arguments.size,
        check=arguments.check,
        source=Path(arguments.checkpoint).resolve().name,
    )
    print(f"{exported.path}: {exported.size / 1e6:.1f} MB")
    unit = "levels of 255" if arguments.uint8 else "of [-1, 1]"
    for (batch, height, width), error in exported.errors.items():
        print(f"  {batch} x {width} x {height}: differs from the model by at most {error:.2g} {unit}")
    return 0


def _weights_import(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.weights import describe, import_weights

    file, weights = import_weights(arguments.source, arguments.out, arguments.which)
    print(f"{describe(weights)}\n{file}")
    return 0


def _weights_export(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.weights import export_weights

    files = export_weights(
        arguments.source,
        arguments.out,
        which=arguments.which,
        label=arguments.label,
        file_format=arguments.format,
        direction=arguments.direction,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
    )
    for file in files:
        print(file)
    return 0


def _weights_show(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.weights import report

    print(report(arguments.source, arguments.which))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.inference.demo.limits import checked_limits
    from cyclegan_fast.inference.demo.server import bound_socket, require_gradio, serve
    from cyclegan_fast.inference.translate import load

    limits = checked_limits(arguments.max_upload, arguments.max_megapixels)
    require_gradio()
    with bound_socket(arguments.host, arguments.port) as listening:
        translator = load(
            arguments.checkpoint, which=arguments.which, device=arguments.device, precision=arguments.precision
        )
        name = Path(arguments.checkpoint).resolve().stem
        try:
            serve(translator, listening, host=arguments.host, name=name, limits=limits)
        except KeyboardInterrupt:  # how a page is ended
            return 0
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cyclegan_fast.doctor import measure, report

    if arguments.measure is not None:
        print(f"measured {measure(arguments.measure)}\n", flush=True)
    print(report())
    return 0
