"""Put load on a server over HTTP, on a service in this process or on a simulator; see what came of it."""

COMMANDS = {
    "serve": "Send a workload by schedule; flags of vllm bench serve.",
    "search": "Find the highest rate at which enough is on time.",
    "latency-by-length": "Latency against what requests ask for.",
    "compare": "Set results side by side: a table and figures.",
    "profile": "Run a workload profile of llm-d-benchmark.",
    "validate": "Say whether files are Benchmark Reports.",
    "convert": "Convert results from one format to another.",
}
"""Name -> what `neustream bench --help` says of it."""
