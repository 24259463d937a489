"""Arguments of the ``swa`` command that make no sense, and what it says."""

from typing import Any

from tests.bad_input.row import Bad
from tests.helpers.paths import DATA

MODEL, TEXT = DATA / "tiny-swa-sliding", DATA / "acts-1-7.txt"
# A directory: "short" has two tokens, "empty" nothing, "config.json" no dtype, and "trace" a
# request.
HERE = "{here}"


# A right value of each flag.
_RIGHT: dict[str, dict[str, str]] = {
    "plan": {
        "--window": "64",
        "--sink-tokens": "4",
        "--phase": "prefill",
        "--full-attention-layers": "0",
        "--block-size": "16",
        "--output": "64",
        "--max-model-len": "512",
        "--max-num-seqs": "256",
        "--max-num-batched-tokens": "8192",
        "--tensor-parallel-size": "1",
        "--pipeline-parallel-size": "2",
        "--kv-memory": "16GiB",
        "--prompt": "100,448",
        "--plot": f"{HERE}/a.png",
        "--json": f"{HERE}/a.json",
    },
    "trace": {
        "--window": "64",
        "--sink-tokens": "4",
        "--phase": "decode",
        "--block-size": "16",
        "--max-num-batched-tokens": "64",
        "--output": "4",
        "--prompt": "10,40",
        "--pool-tokens": "4096",
        "--steps-in-flight": "2",
        "--json": f"{HERE}/a.json",
    },
    "bench pages": {
        "--window": "8",
        "--prompt": "100",
        "--output": "8",
        "--max-model-len": "108",
        "--pool-tokens": "4096",
        "--steps-in-flight": "2",
    },
    "bench prefill": {
        "--window": "48",
        "--max-num-batched-tokens": "64",
        "--rounds": "2",
        "--prompt": "300",
    },
    "bench sinks": {"--sink-tokens": "4"},
    "bench overhead": {"--batch": "2", "--rounds": "2"},
    "bench serve": {
        "--window": "16",
        "--peers": "here,stock",
        "--once": "stock",
        "--trace": f"{HERE}/trace",
        "--plot": f"{HERE}/a.png",
    },
    "bench decode": {
        "--contexts": "64,128",
        "--full-to": "64",
        "--peers": "here,stock",
        "--steps": "3",
    },
    "eval ppl": {
        "--window": "8",
        "--sink-tokens": "0",
        "--full-attention-layers": "0",
        "--length": "64",
        "--prompt-tokens": "32",
        "--max-num-batched-tokens": "512",
        "--block-size": "32",
        "--text": str(TEXT),
        "--plot": f"{HERE}/a.png",
        "--json": f"{HERE}/a.json",
    },
    "eval needle": {
        "--lengths": "200",
        "--depths": "2",
        "--trials": "1",
        "--sink-tokens": "4",
        "--generated": "64",
    },
    "eval stream": {
        "--tokens": "1024",
        "--arms": "shifted,window",
        "--window": "64",
        "--text": str(TEXT),
    },
}
# What the defaults of a command need to be taken, or to be done in a short time.
_SHORT: dict[str, list[str]] = {
    "bench pages": ["--window", "8", "--prompt", "100", "--output", "8", "--num-requests", "2"],
    "bench overhead": ["--quick"],
    "eval ppl": ["--window", "8", "--sink-tokens", "0"],
    "eval stream": ["--tokens", "1024", "--window", "64"],
}


def _says(
    command: str, arguments: list[str], got: str, allowed: str, do: str, *remedies: list[str]
) -> Bad:
    """A row whose flags are to be given right values, unless ``remedies`` say something else."""
    common: dict[str, list[Any]] = {
        "plan": [MODEL, "--output", 64],
        "trace": ["--prompt", "40", "--output", 4],
        "eval ppl": [MODEL, "--text", TEXT, "--length", 64],
        "eval needle": [MODEL, "--window", 64, "--lengths", 200],
        "eval stream": [MODEL, "--text", TEXT],
    }
    first = [*command.split(), *common.get(command, ())]
    if not remedies:
        pairs = zip(arguments[::2], arguments[1::2], strict=True)
        right = _RIGHT[command]
        remedies = ([part for flag, _ in pairs for part in (flag, right[flag])],)
    return Bad(
        " ".join([command, *arguments])[:80],
        [*first, *arguments],
        got,
        allowed,
        do,
        remedies=tuple([*first, *_SHORT.get(command, ()), *remedy] for remedy in remedies),
    )


def _range(command: str, flag: str, value: str, least: int = 1, *others: str) -> Bad:
    """A number that is too small or too large."""
    allowed = f"must be at least {least} and below 2**31"
    return _says(command, [*others, flag, value], f"got {value}", allowed, f"error: {flag}")


def _usage(arguments: list[str], got: str, allowed: str, do: str) -> Bad:
    """What argparse refuses, with status 2."""
    return Bad(" ".join(["usage:", *arguments]), arguments, got, allowed, do, SystemExit)


_PLAN = [
    _says("plan", ["--window", "0"], "got 0", "must be an integer >= 1", "--window"),
    _says("plan", ["--window", str(10**30)], f"got {10**30}", "below 2**31", "--window"),
    _says("plan", ["--sink-tokens", "-1"], "got -1", "an integer >= 0", "--sink-tokens"),
    _says("plan", ["--sink-tokens", "512"], "=512 is", "not below max_model_len 512", "Give fewer"),
    _says(
        "plan",
        ["--device", "cpu", "--phase", "decode", "--kv-cache-dtype", "fp8"],
        "--phase decode cannot be had with --kv-cache-dtype fp8",
        "not tested on CPUs",
        "remove --phase decode, or use --kv-cache-dtype auto",
        ["--device", "cpu", "--kv-cache-dtype", "fp8"],
        ["--device", "cpu", "--phase", "decode", "--kv-cache-dtype", "auto"],
    ),
    _says(
        "plan",
        ["--full-attention-layers", "4"],
        "layer 4 is out",
        "has layers 0..3",
        "--full-attention-layers",
    ),
    _says("plan", ["--full-attention-layers", "0-3"], "names all 4", "no window would", "leave at"),
    _says(
        "plan",
        ["--device", "cpu", "--sink-tokens", "4", "--kv-cache-dtype", "fp8"],
        "--sink-tokens cannot be had with --kv-cache-dtype fp8",
        "not tested on CPUs",
        "remove --sink-tokens, or use --kv-cache-dtype auto",
        ["--device", "cpu", "--kv-cache-dtype", "fp8"],
        ["--device", "cpu", "--sink-tokens", "4", "--kv-cache-dtype", "auto"],
    ),
    *(_range("plan", f"--{flag}", "0") for flag in ("block-size", "output", "max-model-len")),
    *(_range("plan", f"--{flag}", "-2") for flag in ("max-num-seqs", "tensor-parallel-size")),
    _range("plan", "--max-model-len", str(10**18)),
    *(
        _says(
            "plan", ["--kv-memory", text], f"--kv-memory {text!r}", "a unit (KiB", "such as 16GiB"
        )
        for text in (
            "lots",
            "16",
            "0GiB",
            "nanGiB",
            "1e9GiB",
            "1,5GiB",
            "9" * 18 + "GiB",
            "9" * 400,
        )
    ),
    _says(
        "plan", ["--kv-memory", "1KiB"], "--kv-memory 1KiB", "does not hold a single", "give more"
    ),
    *(
        _says("plan", ["--prompt", text], f"--prompt {text!r}", "write numbers", "commas between")
        for text in ("many", "", "1,,2", "1.5")
    ),
    _says("plan", ["--prompt", "0"], "--prompt 0", "at least 1", "own length is 512"),
    _says("plan", ["--prompt", "449"], "--prompt 449", "at most 448", "own length is 512"),
    _says(
        "plan", ["--output", "512"], "--output 512", "own length is 512", "lower the one or raise"
    ),
    _says(
        "plan",
        ["--output", "512", "--max-model-len", "500"],
        "--output 512",
        "--max-model-len is 500",
        "lower the one or raise",
    ),
    _range("plan", "--pipeline-parallel-size", "0"),
    _says("plan", ["--pipeline-parallel-size", "5"], "size 5 is", "model's 4 layers", "give fewer"),
    _says(
        "plan",
        ["--device", "cpu", "--pipeline-parallel-size", "2"],
        "--pipeline-parallel-size 2",
        "fails in vLLM's CPU build",
        "leave it out, or plan for --device gpu",
        ["--device", "cpu"],
        ["--device", "gpu", "--pipeline-parallel-size", "2"],
    ),
    _says("plan", ["--tensor-parallel-size", "3"], "size 3 does", "divide this", "give one that"),
    _says(
        "plan", ["--max-num-batched-tokens", "100"], "100 is", "below --max-num-seqs", "raise the"
    ),
    _says("plan", ["--plot", "a.pdf"], "--plot a.pdf", "the picture is a PNG", "ends in .png"),
    _says(
        "plan", ["--plot", "/nowhere/a.png"], "/nowhere/a.png", "does not exist", "make it first"
    ),
    _says("plan", ["--json", "/nowhere/a"], "--json /nowhere/a", "does not exist", "make it first"),
    _says("plan", ["--json", HERE], "--json /", "is a directory", "give the name of a file in it"),
]

_TRACE = [
    *(
        _range("trace", f"--{flag}", "0")
        for flag in ("window", "block-size", "max-num-batched-tokens", "output")
    ),
    _range("trace", "--window", str(10**30)),
    _range("trace", "--sink-tokens", "-1", 0),
    *(
        _says("trace", ["--prompt", text], f"--prompt {text!r}", "write numbers", "commas between")
        for text in ("10,x", "0", "", "-4", "1e3", "9" * 30)
    ),
    _says("trace", ["--phase", "prefill"], "--phase prefill", "nothing to map", "give decode"),
    _says("trace", ["--pool-tokens", "31"], "--pool-tokens 31", "less than two pages", "give more"),
    _says(
        "trace",
        ["--block-size", str(10**9), "--pool-tokens", "32768"],
        "--block-size 1000",
        "two pages",
        "smaller pages",
    ),
    _says(
        "trace",
        ["--prompt", "500", "--pool-tokens", "160"],
        "--pool-tokens 160 is 10 pages",
        "the longest request may take",
        "give more",
    ),
    _says("trace", ["--steps-in-flight", "3"], "got 3", "must be 1 or 2", "steps in flight"),
    _says(
        "trace", ["--json", "/nowhere/a"], "--json /nowhere/a", "does not exist", "make it first"
    ),
]

_BENCH = [
    _range("bench pages", "--window", "0"),
    _range("bench pages", "--prompt", "-1", 1, "--window", "8"),
    _says(
        "bench prefill",
        ["--phase", "decode"],
        "--phase decode leaves a prompt full",
        "all that is timed here",
        "leave --phase out",
        ["--quick", "--rounds", "2", "--max-num-batched-tokens", "64", "--window", "48"],
    ),
    _range("bench prefill", "--window", "0"),
    _range("bench prefill", "--max-num-batched-tokens", "0"),
    _range("bench prefill", "--prompt", "0"),
    _range("bench sinks", "--sink-tokens", "0"),
    _range("bench overhead", "--batch", "0"),
    _says("bench overhead", ["--rounds", "0"], "got 0", "must be at least 2", "--rounds"),
    _says("bench prefill", ["--rounds", "1"], "got 1", "must be at least 2", "--rounds"),
    _says(
        "bench pages",
        ["--window", "8", "--prompt", "100", "--output", "8", "--max-model-len", "100"],
        "--max-model-len 100",
        "prompt + output = 108",
        "raise it to that, or leave it out",
        ["--max-model-len", "108"],
        [],
    ),
    _says(
        "bench pages", ["--prompt", "100"], "a workload of your own", "in tokens", "needs --window"
    ),
    _says(
        "bench pages",
        ["--quick", "--window", "8"],
        "--quick is",
        "for the built-in",
        "remove it or",
        [],
    ),
    _says(
        "bench pages",
        ["--window", "8", "--pool-tokens", "10"],
        "--pool-tokens 10",
        "less than two pages of --block-size 16",
        "give more",
    ),
    _says(
        "bench pages",
        ["--window", "8", "--steps-in-flight", "3"],
        "got 3",
        "must be 1 or 2",
        "--steps-in-flight",
    ),
    _range("bench serve", "--window", "0"),
    _says(
        "bench serve",
        ["--window", "1280"],
        "--window 1280 is",
        "not below the longest request, 1280 tokens",
        "give a smaller one",
    ),
    _says(
        "bench serve",
        ["--window", "1024", "--phase", "decode"],
        "--window 1024 is",
        "not below the longest answer, 1024 tokens",
        "give a smaller one",
        ["--window", "1023", "--phase", "decode"],
    ),
    _says("bench serve", ["--peers", "here,tgi"], "'tgi'", "here, stock, full, hf", "--peers"),
    _says("bench serve", ["--peers", "stock"], "--peers stock", "in every round", "name it"),
    _says("bench serve", ["--once", "here"], "--once here", "in every round", "not in --once"),
    _says(
        "bench serve",
        ["--pool-requests", "1"],
        "--pool-requests 1 is a pool of 40 pages",
        "charges its longest request 41",
        "give more, or leave stock out",
        ["--pool-requests", "2"],
        ["--pool-requests", "1", "--peers", "here,full"],
    ),
    _says(
        "bench serve",
        ["--pool-requests", "1", "--peers", "here,full", "--phase", "decode"],
        "--pool-requests 1 is a pool of 40 pages",
        "does not start with fewer than 42",
        "give more",
        ["--pool-requests", "2", "--peers", "here,full", "--phase", "decode"],
    ),
    _says("bench serve", ["--trace", "nowhere"], "nowhere", "No such file", "file of JSON lines"),
    _says(
        "bench serve",
        ["nowhere"],
        "nowhere is no",
        "config.json",
        "give one with a dense Qwen3",
        [str(MODEL)],
    ),
    _says("bench serve", ["--plot", "a.svg"], "--plot a.svg", "is a PNG", "ends in .png"),
    *(
        _says("bench decode", ["--contexts", text], f"--contexts {text!r}", "from 1 on", "commas")
        for text in ("a", "64,,128", "0", "9" * 30)
    ),
    _says(
        "bench decode",
        ["--contexts", "64", "--full-to", "8"],
        "--full-to 8",
        "below all of --contexts 64",
        "raise it",
    ),
    _says("bench decode", ["--peers", "here,hf"], "here,hf", "with here", "stock or full beside"),
    _range("bench decode", "--steps", "2", 3),
]

_SLIDE = "nothing would slide"
_EVAL = [
    *(
        _says(
            "eval ppl",
            ["--window", text],
            f"got {text.split(',')[-1]!r}",
            "from 1 on",
            "--window",
        )
        for text in ("0", "64,many", "", "8.0", "-8", "9" * 5000)
    ),
    _says(
        "eval ppl", ["--sink-tokens", "-1"], "got '-1'", "integers from 0 on", "--sink-tokens takes"
    ),
    _says(
        "eval ppl",
        ["--window", "full", "--sink-tokens", "4"],
        "--window full has no window",
        "no effect",
        "Give a number of tokens",
        ["--sink-tokens", "4"],
        ["--window", "full", "--sink-tokens", "0"],
    ),
    _says(
        "eval ppl",
        ["--window", "full", "--sink-tokens", "0", "--full-attention-layers", "0"],
        "--window full has no window",
        "full layers would have no effect",
        "no --full-attention-layers",
        ["--full-attention-layers", "0"],
        ["--window", "full", "--sink-tokens", "0"],
    ),
    _says(
        "eval ppl",
        ["--window", "60", "--sink-tokens", "0,4"],
        "a window of 60 with 4 sinks",
        f"not below --length 64: {_SLIDE}",
        "Give longer pieces, or a smaller window",
        ["--window", "60", "--sink-tokens", "0,4", "--length", "65"],
        ["--window", "59", "--sink-tokens", "0,4"],
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--sink-tokens", "0", "--position-shift"],
        "--sink-tokens 0 has none",
        "moves sinks",
        "give some, or leave it out",
        ["--sink-tokens", "4", "--position-shift"],
        [],
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--full-attention-layers", "9"],
        "layer 9 is out of range",
        "this model has layers 0..3",
        "swa.full_attention_layers",
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--length", "9000"],
        "the text has 8888 tokens",
        "less than one piece of 9000",
        "give a longer text",
    ),
    _says(
        "eval ppl",
        ["--window", "full", "--sink-tokens", "0", "--length", "1"],
        "got 1",
        "at least 2 tokens",
        "--length",
    ),
    *(
        _range("eval ppl", f"--{flag}", "0", 1, "--window", "8")
        for flag in ("max-num-batched-tokens", "block-size")
    ),
    _range("eval ppl", "--max-num-batched-tokens", str(10**12), 1, "--window", "8"),
    *(
        _says("eval ppl", ["--window", "8", "--text", text], f"{text} ".replace(HERE, ""), why, do)
        for text, why, do in (
            ("nowhere", "cannot be read: No such file", "give a text file"),
            (HERE, "cannot be read: Is a directory", "give a text file"),
            (str(MODEL / "model.safetensors"), "is no UTF-8", "give a text file in UTF-8"),
        )
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--text", f"{HERE}/empty"],
        "the text has 0 tokens",
        "less than one piece of 64",
        "give a longer text",
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--plot", "a.pdf"],
        "--plot a.pdf",
        "is a PNG",
        "ends in .png",
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--json", "/nowhere/a"],
        "--json /nowhere/a",
        "the directory does not exist",
        "make it first",
    ),
    _says(
        "eval ppl",
        ["--window", "8", "--phase", "prefill"],
        "--phase prefill",
        "without --prompt-tokens a whole piece is a prompt",
        "below --length 64, or leave --phase out",
        ["--window", "8", "--phase", "prefill", "--prompt-tokens", "63"],
        ["--window", "8"],
    ),
    _says(
        "eval ppl",
        ["--prompt-tokens", "64"],
        "--prompt-tokens 64",
        "not below --length 64: no token would be left",
        "Give longer pieces, or a shorter prompt",
        ["--prompt-tokens", "64", "--length", "65"],
        ["--prompt-tokens", "63"],
    ),
    _range("eval ppl", "--prompt-tokens", "0"),
    _says(
        "eval ppl",
        ["--window", "full", "--sink-tokens", "0", "--phase", "prefill", "--prompt-tokens", "32"],
        "--phase prefill",
        "--window full has none",
        "give a number of tokens, or leave --phase out",
        ["--phase", "prefill", "--prompt-tokens", "32"],
        ["--window", "full", "--sink-tokens", "0", "--prompt-tokens", "32"],
    ),
    _says(
        "eval ppl",
        ["--window", "28", "--sink-tokens", "4", "--phase", "prefill", "--prompt-tokens", "32"],
        "a window of 28 with 4 sinks",
        f"not below --prompt-tokens 32: {_SLIDE}",
        "Give a longer prompt, or a smaller window",
        ["--window", "28", "--sink-tokens", "4", "--phase", "prefill", "--prompt-tokens", "33"],
        ["--window", "27", "--sink-tokens", "4", "--phase", "prefill", "--prompt-tokens", "32"],
    ),
    _says(
        "eval ppl",
        ["--window", "32", "--sink-tokens", "4", "--phase", "decode", "--prompt-tokens", "32"],
        "a window of 32 with 32 tokens of the prompt",
        f"not below --length 64: {_SLIDE}",
        "Give longer pieces, or a smaller window",
        ["--window", "31", "--sink-tokens", "4", "--phase", "decode", "--prompt-tokens", "32"],
    ),
    _says(
        "eval needle",
        ["--phase", "decode"],
        "--phase decode hides nothing",
        "which sees all of it",
        "ask behind generated text with --generated N, or leave --phase out",
        ["--phase", "decode", "--generated", "100"],
        [],
    ),
    _says(
        "eval needle",
        ["--phase", "decode", "--generated", "64"],
        "a window of 64",
        "not below --generated 64",
        "Give more, or a smaller window",
        ["--phase", "decode", "--generated", "65"],
        ["--phase", "decode", "--generated", "64", "--window", "63"],
    ),
    _says(
        "eval needle",
        ["--generated", "137"],
        "leaves 63 tokens of --lengths 200",
        "64 are needed",
        "give fewer, or longer ones",
        ["--generated", "136"],
        ["--generated", "137", "--lengths", "201"],
    ),
    _range("eval needle", "--generated", "-1", 0),
    _says("eval needle", ["--lengths", "63"], "got '63'", "integers from 64 on", "--lengths"),
    _says("eval needle", ["--lengths", "200,long"], "got 'long'", "from 64 on", "--lengths"),
    _says("eval needle", ["--lengths", "9" * 30], "got '999", "from 64 on", "--lengths"),
    _range("eval needle", "--depths", "1", 2),
    _range("eval needle", "--trials", "0"),
    _says("eval needle", ["--sink-tokens", "-1"], "got -1", "an integer >= 0", "swa.sink_tokens"),
    _says(
        "eval needle",
        ["--window", "200"],
        "a window of 200",
        "longest of --lengths, 200",
        "Give a longer one, or a smaller window",
        ["--window", "200", "--lengths", "300"],
        ["--window", "64"],
    ),
    *(
        _says(
            "eval stream",
            ["--tokens", n],
            f"got {n}",
            "twice the trained length of 512",
            "give more",
        )
        for n in ("1000", "0", "-5")
    ),
    _says(
        "eval stream",
        ["--arms", "shifted,half"],
        "got half",
        "shifted, sinks, window, full",
        "--arms",
    ),
    _says(
        "eval stream",
        ["--sink-tokens", "0"],
        "got --sink-tokens 0",
        "shifted needs sinks",
        "give some, or --arms window",
        ["--arms", "shifted", "--sink-tokens", "4"],
        ["--sink-tokens", "0", "--arms", "window"],
    ),
    _says(
        "eval stream",
        ["--arms", "full", "--phase", "prefill"],
        "--phase prefill",
        "--arms full has none",
        "give an arm with a window, or leave --phase out",
        ["--arms", "full,window", "--phase", "prefill"],
        ["--arms", "full,window", "--phase", "decode"],
        ["--arms", "full"],
    ),
    _says(
        "eval stream",
        ["--phase", "decode"],
        "--arms shifted,sinks: shifted moves sinks",
        "the whole prompt, where it is",
        "give --arms window, or leave --phase out",
        ["--phase", "decode", "--arms", "window"],
        [],
    ),
    _says("eval stream", ["--window", "0"], "got 0", "must be an integer >= 1", "swa.window"),
    _says(
        "eval stream",
        ["--text", f"{HERE}/short"],
        "the text has 2 tokens",
        "trained length of 512",
        "give a longer one",
    ),
]

_NONE = "does not exist"
_PLANNED = ["plan", "--output", "64"]
_OTHERS = [
    Bad(
        "plan nowhere",
        ["plan", "/nowhere"],
        "/nowhere",
        _NONE,
        "download config.json",
        remedies=([*_PLANNED, MODEL], [*_PLANNED, MODEL / "config.json"]),
    ),
    Bad(
        "plan a device",
        ["plan", "/dev/null"],
        "/dev/null",
        "is not JSON",
        "give the config.json",
        remedies=([*_PLANNED, MODEL / "config.json"],),
    ),
    Bad(
        "no model",
        ["eval", "ppl", "./nowhere", "--text", TEXT],
        "./nowhere: ",
        "config.json",
        "dir",
        remedies=(["eval", "ppl", MODEL, "--text", TEXT, "--length", 64, *_SHORT["eval ppl"]],),
    ),
    Bad(
        "no dtype",
        ["plan", f"{HERE}/config.json", "--output", "64"],
        "config.json has dtype None",
        "one of bfloat16, float16",
        "give --dtype",
        remedies=(["plan", f"{HERE}/config.json", "--output", "64", "--dtype", "float16"],),
    ),
    Bad(
        "check what",
        ["check", "--window", "64"],
        "--window is",
        "about a model",
        "give MODEL",
        remedies=(["check", MODEL, "--window", "64"],),
    ),
    *(
        Bad(
            f"check overrides {wrong}",
            ["check", MODEL, "--hf-overrides", wrong],
            f"got {wrong!r}",
            "--hf-overrides must be a JSON object",
            """give one such as '{"max_position_embeddings": 512}'""",
            remedies=(["check", MODEL, "--hf-overrides", '{"max_position_embeddings": 512}'],),
        )
        for wrong in ("rope", "[1]", "{")
    ),
    _usage(
        ["nosuch"], "'nosuch'", "'plan', 'check', 'trace', 'tune', 'bench', 'eval'", "choose from"
    ),
    _usage(["plan"], "the following arguments", "MODEL", "are required"),
    *(
        _usage(
            ["plan", str(MODEL), "--window", text], repr(text), "neither a number nor", "--window"
        )
        for text in ("1e3", "[8]", "true", "{")
    ),
    _usage(
        ["plan", str(MODEL), "--phase", "answer"], "'answer'", "'both', 'prefill'", "choose from"
    ),
    _usage(
        ["plan", str(MODEL), "--dtype", "int3"], "'int3'", "'bfloat16', 'float16'", "choose from"
    ),
    _usage(
        ["plan", str(MODEL), "--windw", "8"],
        "--windw 8",
        "unrecognized arguments",
        "did you mean --window?",
    ),
    _usage(["eval", "nosuch"], "'nosuch'", "'ppl', 'needle', 'stream'", "choose from"),
    _usage(
        ["eval", "ppl", "m", "--text", "t", "--dtype", "int3"], "'int3'", "'auto'", "choose from"
    ),
    *(
        _usage(
            ["eval", verb, "m", "--phase", "prompt"], "'prompt'", "'both', 'prefill'", "choose from"
        )
        for verb in ("needle", "stream")
    ),
]

COMMANDS = [*_PLAN, *_TRACE, *_BENCH, *_EVAL, *_OTHERS]
