#!/usr/bin/env python3
"""Parts of scripts/gpu-bench that are not moewe's: golden files, PyTorch, and the table. Standard library alone, but for `torch`.

A part prints one JSON object. What could not be measured has a "reason" instead of figures.
"""

import argparse
import array
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Relative L2 of each tensor; in exact precision expert ids and greedy tokens must be identical, too.
TOLERANCE = {"exact": 2e-5, "fast": 2e-2}


# ---- golden files


def tensors(path):
    """Names to (dtype, numbers) of a safetensors file of F32, F64 and I32."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        numbers = array.array({"F32": "f", "F64": "d", "I32": "i", "I64": "q"}[entry["dtype"]])
        numbers.frombytes(data[8 + length + begin : 8 + length + end])
        found[name] = (entry["dtype"], numbers)
    return found


def distance(found, wanted):
    """Relative L2."""
    error = math.fsum((a - b) ** 2 for a, b in zip(found, wanted))
    size = math.fsum(b * b for b in wanted)
    return math.sqrt(error / size) if size else (0.0 if error == 0 else math.inf)


def call(moewe, *options):
    return subprocess.run([moewe, *options], check=True, capture_output=True, text=True).stdout


def check(arguments, directory, work):
    """A checkpoint against its golden files: the worst tensor, and what is wrong."""
    golden = json.loads((directory / "golden/golden.json").read_text())
    device = ["--device", arguments.device] if arguments.device else []
    common = [*device, "--precision", arguments.precision]
    wrong, worst, count = [], 0.0, 0
    for name, chunk in [("len64", "5"), ("long", None)]:
        sequence = golden["sequences"][name]
        ids = ",".join(map(str, sequence["input_ids"]))
        out = str(Path(work) / "trace.safetensors")
        chunks = ["--prefill-chunk", chunk] if chunk else []
        call(arguments.moewe, "trace", str(directory), "--tokens", ids, "--out", out, *chunks, *common)
        found, wanted = tensors(out), tensors(directory / "golden" / sequence["file"])
        os.remove(out)
        wanted = {name: value for name, value in wanted.items() if not name.startswith("extra.")}
        if found.keys() != wanted.keys():
            wrong.append(f"{name}: not the same tensors")
            continue
        for tensor, (dtype, numbers) in wanted.items():
            count += 1
            if dtype.startswith("I"):
                if arguments.precision == "exact" and list(found[tensor][1]) != list(numbers):
                    wrong.append(f"{name}: {tensor} differs")
                continue
            # A rounded latent may choose another expert, whose output is then another: only logits are held against it.
            if arguments.precision == "exact" or tensor == "logits":
                off = distance(found[tensor][1], numbers)
                worst = max(worst, off)
                if not off <= TOLERANCE[arguments.precision]:
                    wrong.append(f"{name}: {tensor} is off by {off:.2e}")
    if arguments.precision == "exact":
        sequence = golden["sequences"]["len64"]
        ids = ",".join(map(str, sequence["input_ids"]))
        length = str(len(sequence["greedy"]))
        options = ["--tokens", ids, "-n", length, "--temperature", "0", "--ignore-eos", "--json", *common]
        said = json.loads(call(arguments.moewe, "run", str(directory), *options))
        if said["tokens"] != sequence["greedy"]:
            wrong.append("len64: greedy tokens differ")
    return {"checkpoint": directory.name, "tensors": count, "worst": worst, "wrong": wrong[:5]}


def golden(arguments):
    """All checkpoints, as far as time allows."""
    results = []
    directories = sorted(path.parent.parent for path in (ROOT / "tests/golden").glob("*/golden/golden.json"))
    directories = [path for path in directories if "sequences" in json.loads((path / "golden/golden.json").read_text())]
    try:
        with tempfile.TemporaryDirectory() as work:
            for directory in directories:
                try:
                    results.append(check(arguments, directory, work))
                except subprocess.CalledProcessError as error:
                    results.append({"checkpoint": directory.name, "reason": (error.stderr.strip() or str(error))[-300:]})
    except KeyboardInterrupt:
        pass
    done = {result["checkpoint"] for result in results}
    results += [{"checkpoint": path.name, "reason": "out of time"} for path in directories if path.name not in done]
    print(json.dumps({"precision": arguments.precision, "tolerance": TOLERANCE[arguments.precision], "checkpoints": results}))
    return 0 if all(result.get("wrong") == [] for result in results) else 1


# ---- PyTorch


class Torch:
    """Times on the fastest device that PyTorch has."""

    def __init__(self, seconds):
        import torch

        self.torch = torch
        self.end = time.monotonic() + seconds
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def seconds(self, work, times):
        """Median of so many runs behind one that warms up."""
        taken = []
        for _ in range(times + 1):
            self.synchronize()
            begun = time.perf_counter()
            work()
            self.synchronize()
            taken.append(time.perf_counter() - begun)
        taken = sorted(taken[1:])
        return (taken[(len(taken) - 1) // 2] + taken[len(taken) // 2]) / 2

    def floors(self, small):
        torch = self.torch
        numbers = (1 << 22) if small else (1 << 28)
        source = torch.ones(numbers, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        copy = self.seconds(lambda: target.copy_(source), 5)
        rows = 256 if small else 8192
        a, b = (torch.randn(rows, rows, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        product = self.seconds(lambda: a @ b, 5)
        return {
            "copy_gigabytes_per_second": 8 * numbers / copy / 1e9,
            "bf16_product": {"rows": rows, "flops_per_second": 2 * rows**3 / product},
        }

    def lines(self, path, prompts, contexts, batches, tokens):
        """Prefill and decode of a checkpoint by transformers, as far as time and memory allow."""
        torch = self.torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
        model = model.to(self.device).eval()
        vocabulary = model.config.vocab_size

        def random(batch, length):
            return torch.randint(vocabulary, (batch, length), device=self.device)

        def prefill(length):
            ids = random(1, length)
            return self.seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), 2)

        def decode(batch, context):
            # Each sequence has a copy of its own of the same cache.
            cache = model(random(1, context), use_cache=True, logits_to_keep=1).past_key_values
            if batch > 1:
                cache.batch_repeat_interleave(batch)

            def step():
                model(random(batch, 1), past_key_values=cache, use_cache=True)

            count = max(tokens // 2, 1)
            return self.seconds(lambda: [step() for _ in range(count)], 2) / count

        works = [("prefill", 1, length) for length in prompts]
        works += [("decode", batch, context) for batch in batches for context in contexts]
        lines = []
        with torch.inference_mode():
            for kind, batch, size in works:
                line = {"kind": kind, "batch": batch, "prompt_tokens" if kind == "prefill" else "context": size}
                lines.append(line)
                if time.monotonic() > self.end:
                    line["reason"] = "out of time"
                    continue
                try:
                    seconds = prefill(size) if kind == "prefill" else decode(batch, size)
                    line["seconds"] = seconds
                    line["tokens_per_second"] = (size if kind == "prefill" else batch) / seconds
                except torch.OutOfMemoryError:
                    line["reason"] = "out of memory"
                    torch.cuda.empty_cache()
                except Exception as error:  # the next line may work
                    line["reason"] = f"{type(error).__name__}: {error}"[:300]
                except KeyboardInterrupt:
                    line["reason"] = "out of time"
                    self.end = 0
        return lines


def torch_part(arguments):
    try:
        machine = Torch(arguments.seconds)
        said = {"torch": machine.torch.__version__, "device": machine.device}
        if machine.device == "cuda":
            said["name"] = machine.torch.cuda.get_device_name()
        if arguments.model:
            import transformers

            said["transformers"] = transformers.__version__
            sizes = arguments.prompts, arguments.contexts, arguments.batches
            said["lines"] = machine.lines(arguments.model, *sizes, arguments.tokens)
        else:
            said.update(machine.floors(arguments.small))
    except ImportError as error:
        said = {"reason": f"absent: no {error.name}"}
    except KeyboardInterrupt:
        said = {"reason": "out of time before the first line"}
    except Exception as error:  # a table without PyTorch is better than none
        said = {"reason": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(said))


# ---- table

MODELS = [("lite-fp8", "V2-Lite FP8"), ("lite-bf16", "V2-Lite bf16"), ("v3", "V3 layers FP8")]
MODES = ["off", "1", "auto"]


class Parts:
    """What the parts left behind."""

    def __init__(self, out):
        self.out = out
        listed = [line.split("\t") for line in (out / "parts.tsv").read_text().splitlines()]
        self.codes = {name: code for name, code, _ in listed}
        self.seconds = {name: int(seconds) for name, _, seconds in listed}

    def read(self, name):
        """The JSON of a part, or why there is none."""
        code = self.codes.get(name)
        if code is None:
            return None, "not reached: a part before it failed"
        if code == "over":
            return None, "out of time: the minutes were over"
        try:
            return json.loads((self.out / f"{name}.json").read_text()), None
        except (OSError, ValueError):
            if code in ("124", "137"):
                return None, "out of time"
            lines = (self.out / f"{name}.log").read_text(errors="replace").strip().splitlines()
            return None, f"failed ({code}): {lines[-1][-200:] if lines else 'said nothing'}"

    def line(self, name, **wanted):
        """A line of a part, or why there is none."""
        said, reason = self.read(name)
        if said is None:
            return None, reason
        if said.get("reason"):
            return None, said["reason"]
        for line in [*said.get("lines", []), *said.get("skipped", [])]:
            if all(line.get(key) == value for key, value in wanted.items()):
                return (None, line["reason"]) if "reason" in line else (line, None)
        return None, "out of time"


def number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def moewe_row(parts, row, part, **wanted):
    line, reason = parts.line(part, **wanted)
    if line is None:
        return {**row, "reason": reason}
    cpu = line.get("cpu_seconds_per_token")
    return {
        **row,
        "value": line["tokens_per_second"]["median"],
        "unit": "tokens/s",
        "floor": line["floor"]["tokens_per_second"],
        "share": line["share_of_floor"],
        "bound": line["floor"]["bound"],
        "cpu_milliseconds_per_token": None if cpu is None else cpu * 1e3,
        "note": drafts_note(line),
    }


def drafts_note(line):
    if line.get("kind") != "mtp" or line.get("ratio_to_off") is None:
        return ""
    return f"{line['ratio_to_off']['median']:.2f} of off, {line['tokens_per_pass']:.2f} tokens a pass"


def floor_rows(parts):
    said, reason = parts.read("floors")
    figures = [
        ("device copy by a kernel", "copy_gigabytes_per_second.kernel", 1, "GB/s"),
        ("device copy by the driver", "copy_gigabytes_per_second.driver", 1, "GB/s"),
        ("chained dispatch", "dispatch_microseconds", 1, "µs"),
        ("submit and wait", "submit_and_wait_microseconds", 1, "µs"),
        ("product in f32", "matrix_flops_per_second.f32", 1e-9, "GFLOP/s"),
        ("product in f16", "matrix_flops_per_second.f16", 1e-9, "GFLOP/s"),
        ("product by cooperative matrices", "matrix_flops_per_second.cooperative", 1e-9, "GFLOP/s"),
    ]
    yield from figure_rows("moewe", said, reason, figures)
    said, reason = parts.read("torch-floors")
    figures = [
        ("device copy", "copy_gigabytes_per_second", 1, "GB/s"),
        ("bf16 product", "bf16_product.flops_per_second", 1e-9, "GFLOP/s"),
    ]
    yield from figure_rows("PyTorch", said, reason or (said or {}).get("reason"), figures)


def figure_rows(who, said, reason, figures):
    for what, path, factor, unit in figures:
        row = {"part": f"{who}, floors", "work": what}
        value = said
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            yield {**row, "reason": reason or "the device has none"}
        else:
            yield {**row, "value": value * factor, "unit": unit}


def golden_rows(parts):
    for precision in TOLERANCE:
        said, reason = parts.read(f"golden-{precision}")
        row = {"part": "golden files", "work": precision}
        if said is None:
            yield {**row, "reason": reason}
            continue
        results = said["checkpoints"]
        good = sum(result.get("wrong") == [] for result in results)
        bad = [f"{r['checkpoint']}: {r.get('reason') or r['wrong'][0]}" for r in results if r.get("wrong") != []]
        worst = max((r["worst"] for r in results if "worst" in r), default=math.nan)
        note = f"of {len(results)} checkpoints agree; worst relative L2 {worst:.1e}"
        yield {**row, "value": good, "unit": "", "note": "; ".join([note, *bad])}


def rows(parts, plan):
    yield from golden_rows(parts)
    yield from floor_rows(parts)
    for name, title in MODELS:
        title = f"{title}, {plan['v3_layers']} layers" if name == "v3" else title
        works = [("prefill", {"batch": 1, "prompt_tokens": size}, f"prefill {size}") for size in plan["prompts"]]
        works += [
            ("decode", {"batch": batch, "context": size}, f"decode {batch} × behind {size}")
            for batch in plan["batches"]
            for size in plan["contexts"]
        ]
        written, reason = parts.read(f"{name}-write")
        row = {"part": title, "work": "written"}
        if written is None:
            yield {**row, "reason": reason}
        else:
            seconds = max(parts.seconds[f"{name}-write"], 1)
            yield {**row, "value": written["bytes"] / 1e9, "unit": "GB", "note": f"in {seconds} s"}
        for kind, wanted, work in works:
            row = {"part": title, "work": work, "who": "moewe"}
            yield moewe_row(parts, row, f"{name}-{kind}", kind=kind, **wanted)
            if name == "lite-bf16":
                row = {"part": title, "work": work, "who": "transformers"}
                line, reason = parts.line("lite-bf16-torch", kind=kind, **wanted)
                if line is None:
                    yield {**row, "reason": reason}
                else:
                    yield {**row, "value": line["tokens_per_second"], "unit": "tokens/s"}
        if name == "v3":
            for mode in MODES:
                row = {"part": title, "work": f"one stream, MTP {mode}", "who": "moewe"}
                mode = int(mode) if mode.isdigit() else mode
                yield moewe_row(parts, row, "v3-mtp", kind="mtp", mode=mode)


def table(arguments):
    out = Path(arguments.out)
    plan, parts = json.loads((out / "plan.json").read_text()), Parts(out)
    all_rows = list(rows(parts, plan))
    floors, _ = parts.read("floors")
    device = (floors or {}).get("device", {})
    torch, _ = parts.read("torch-floors")
    result = {
        "date": (floors or {}).get("date"),
        "device": device,
        "torch": {key: (torch or {}).get(key) for key in ("torch", "device", "name", "reason")},
        **plan,
        "seconds": arguments.seconds,
        "part_seconds": parts.seconds,
        "rows": all_rows,
        "parts": {name: parts.read(name)[0] for name in parts.codes},
    }
    (out / "gpu-bench.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    lines = [
        f"# {device.get('name', 'no device')}, {device.get('driver', '')} {device.get('driver_info', '')}".rstrip(),
        "",
        f"{result['date']}; precision {plan['precision']}; {arguments.seconds} s in all. A floor is the longer of bytes over copy "
        "speed and operations over matrix rate; CPU is time of processors.",
        "",
        "| part | work | by | measured | floor | reached | bound | CPU ms a token | note |",
        "|---|---|---|---:|---:|---:|---|---:|---|",
    ]
    for row in all_rows:
        cells = [row["part"], row["work"], row.get("who", "")]
        if "reason" in row:
            cells += ["–", "", "", "", "", row["reason"]]
        else:
            cpu = row.get("cpu_milliseconds_per_token")
            cells += [
                f"{number(row['value'])} {row['unit']}".strip(),
                number(row["floor"]) if "floor" in row else "",
                f"{100 * row['share']:.1f} %" if "share" in row else "",
                row.get("bound", ""),
                "" if cpu is None else f"{cpu:.3g}",
                row.get("note", ""),
            ]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    (out / "gpu-bench.md").write_text("\n".join(lines) + "\n")


def plan_part(arguments):
    plan = {
        "small": bool(arguments.small),
        "prompts": arguments.prompts,
        "contexts": arguments.contexts,
        "batches": arguments.batches,
        "precision": arguments.precision,
        "v3_layers": arguments.v3_layers,
    }
    (Path(arguments.out) / "plan.json").write_text(json.dumps(plan))


def main():
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("golden")
    part.set_defaults(run=golden)
    part.add_argument("--moewe", required=True)
    part.add_argument("--device")
    part.add_argument("--precision", required=True, choices=TOLERANCE)
    part = parts.add_parser("torch")
    part.set_defaults(run=torch_part)
    part.add_argument("--seconds", type=float, required=True)
    part.add_argument("--model")
    part.add_argument("--tokens", type=int, default=8)
    part.add_argument("--small", action="store_true")
    for name in ("--prompts", "--contexts", "--batches"):
        part.add_argument(name, type=numbers, default=[])
    part = parts.add_parser("plan")
    part.set_defaults(run=plan_part)
    part.add_argument("--out", required=True)
    part.add_argument("--precision", required=True)
    part.add_argument("--v3-layers", type=int, required=True)
    part.add_argument("--small", type=int, default=0)
    for name in ("--prompts", "--contexts", "--batches"):
        part.add_argument(name, type=numbers, required=True)
    part = parts.add_parser("table")
    part.set_defaults(run=table)
    part.add_argument("--out", required=True)
    part.add_argument("--seconds", type=int, required=True)
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    main()
