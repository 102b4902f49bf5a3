"""What the dashboards show. Metrics and recording rules: docs/metrics.md."""

from __future__ import annotations

from loadtest.dashboards.panels import COUNT, RATE, SECONDS, SHARE, Query, Row, dashboard, graph, number, of
from serve_app.scaling.readings import STAGES, Stage


def boards() -> dict[str, str]:
    """File name → JSON."""
    return {
        "overview.json": overview(),
        "stages.json": stages(),
        "gpus.json": gpus(),
        "scaling.json": scaling(),
    }


def overview() -> str:
    return dashboard(
        "whisper-overview",
        "Whisper / Overview",
        "How the service does, and the twelve metrics to watch.",
        [_now(), _twelve(), _objectives()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Real-time factor",
                COUNT,
                "Seconds of audio transcribed a second.",
                Query(f"sum({of('whisper:rtfx:rate1m')})", ""),
            ),
            number(
                "Requests under way",
                COUNT,
                "Recordings that the API's replicas work on.",
                Query(f"sum({of('ray_whisper_requests_active')})", ""),
            ),
            number(
                "Request, p99",
                SECONDS,
                "From a recording's arrival to its transcript; it grows with the recordings' length.",
                Query(f"max({of('whisper:request_seconds:p99_5m')})", ""),
            ),
            number(
                "Failed requests",
                SHARE,
                "By the service's own fault: failed, deadline, overloaded.",
                Query(f"max({of('whisper:requests_failed:ratio5m')})", ""),
            ),
            number(
                "Windows waiting",
                COUNT,
                "For all stages, in replicas and at callers.",
                Query(f"sum({of('whisper:stage_queue_windows:sum')})", ""),
            ),
            number(
                "Alerts firing",
                COUNT,
                "Of this project's rules; docs/operations.md has a section for each.",
                Query('count(ALERTS{alertname=~"Whisper.*",alertstate="firing"}) or vector(0)', ""),
            ),
        ],
    )


def _twelve() -> Row:
    return Row(
        "The twelve to watch",
        [
            graph(
                "1 · SM utilization",
                SHARE,
                "Busy share of a GPU's multiprocessors. Kind says how it was counted; cpu_busy is a CPU replica's busy "
                "share in its place.",
                Query(of("whisper:sm_utilization:max"), "{{gpu}} ({{kind}})"),
                most=1,
            ),
            graph(
                "2 · Memory bandwidth",
                "Bps",
                "Traffic of a GPU's memory (Hopper and later).",
                Query(of("whisper:dram_bytes_per_second:max"), "{{gpu}}"),
            ),
            graph(
                "3 · Compute throughput",
                "flops",
                "The engine's own count of its work.",
                Query(of("whisper:stage_flops:rate1m"), "{{stage}}"),
            ),
            graph(
                "4 · GPU memory",
                SHARE,
                "In use, by all processes.",
                Query(of("whisper:gpu_memory_used:ratio"), "{{gpu}}"),
                most=1,
            ),
            graph("5 · Power", "watt", "Of all GPUs.", Query(of("whisper:gpu_power_watts:sum"), "{{namespace}}")),
            graph(
                "6 · Batch size",
                COUNT,
                "Mean windows of a batch, or of a decoding step.",
                Query(of("whisper:stage_batch_windows:mean1m"), "{{stage}}"),
            ),
            graph(
                "7 · Queue",
                COUNT,
                "Windows that wait for a stage, in its replicas and at callers.",
                Query(of("whisper:stage_queue_windows:sum"), "{{stage}}"),
            ),
            graph(
                "7 · Wait",
                SECONDS,
                "p99 in the replicas' queues, and how long the first of all that wait has waited.",
                Query(of("whisper:stage_wait_seconds:p99_5m"), "{{stage}} p99"),
                Query(of("whisper:stage_oldest_wait_seconds:max"), "{{stage}} oldest"),
            ),
            graph(
                "8 · Latency by stage",
                SECONDS,
                "From when a window asks for a stage until it has its result.",
                Query(of("whisper:stage_latency_seconds:p99_5m"), "{{stage}} p99"),
                Query(of("whisper:stage_latency_seconds:p50_5m"), "{{stage}} p50"),
            ),
            graph(
                "9 · End-to-end latency",
                SECONDS,
                "From a recording's arrival to its transcript.",
                Query(of("whisper:request_seconds:p99_5m"), "p99"),
                Query(of("whisper:request_seconds:p50_5m"), "p50"),
            ),
            graph(
                "10 · Real-time factor",
                COUNT,
                "Seconds of audio a second: of the application, and what passes each stage.",
                Query(of("whisper:rtfx:rate1m"), "application"),
                Query(of("whisper:stage_rtfx:rate1m"), "{{stage}}"),
            ),
            graph(
                "11 · Tokens",
                RATE,
                "Tokens of windows that were decoded.",
                Query(of("whisper:tokens_per_second:rate1m"), "tokens"),
            ),
            graph(
                "12 · Errors",
                RATE,
                "Windows given up, by stage and reason.",
                Query(of("whisper:stage_errors:rate5m"), "{{stage}} {{reason}}"),
            ),
            graph(
                "12 · Retries",
                RATE,
                "Windows sent again: a replica died, a call broke off, a queue was full, or a result was lost.",
                Query(of("whisper:stage_retries:rate5m"), "{{stage}} {{reason}}"),
            ),
            graph(
                "12 · Requests by outcome",
                RATE,
                "Done, invalid and cancelled are no failures of the service.",
                Query(of("whisper:requests:rate1m"), "{{outcome}}"),
            ),
        ],
    )


def _objectives() -> Row:
    failed, slow = "whisper:requests_failed:ratio", "whisper:stage_slow:ratio"
    return Row(
        "Objectives: how fast they use what they allow (1: a month's allowance in a month)",
        [
            graph(
                "Failed requests, of 0.1 %",
                COUNT,
                "Alerts: 14.4 over an hour, 6 over six hours, 1 over three days.",
                *(Query(f"{of(failed + span)} / 0.001", span) for span in ("5m", "1h", "6h", "3d")),
            ),
            graph(
                "Windows slower than 10 s, of 1 %",
                COUNT,
                "Alerts: 14.4 over an hour, 6 over six hours.",
                *(Query(f"{of(slow + span)} / 0.01", f"{{{{stage}}}} {span}") for span in ("5m", "1h", "6h")),
            ),
            graph(
                "Speed of requests, p50 and p5",
                COUNT,
                "A recording's seconds by those it took.",
                *(
                    Query(
                        f"histogram_quantile({share}, sum by (le) "
                        f"(rate({of('ray_whisper_request_rtfx_bucket')}[$__rate_interval])))",
                        name,
                    )
                    for share, name in ((0.5, "p50"), (0.05, "p5"))
                ),
            ),
        ],
    )


def stages() -> str:
    return dashboard(
        "whisper-stages",
        "Whisper / Stages",
        "Features, encoder and decoder, replica by replica, and the API's replicas that call them.",
        [_callers(), *(_stage(stage) for stage in STAGES)],
    )


def _callers() -> Row:
    return Row(
        "API",
        [
            graph(
                "Requests under way",
                COUNT,
                "Recordings that an API replica works on.",
                Query(of("ray_whisper_requests_active"), "{{replica}}"),
            ),
            graph(
                "Windows held",
                COUNT,
                "Windows that wait in an API replica until a stage takes them.",
                Query(of("ray_whisper_credit_queue_windows"), "{{replica}} → {{stage}}"),
            ),
            graph(
                "Replicas",
                COUNT,
                "Replicas that tell of themselves.",
                Query(of("whisper:stage_replicas:count"), "{{stage}}"),
                Query(f"count by (namespace, whisper_release) ({of('ray_whisper_requests_active')})", "api"),
            ),
        ],
    )


def _stage(stage: Stage) -> Row:
    this = f'stage="{stage}"'
    each = "{{replica}}"
    return Row(
        stage.capitalize(),
        [
            graph(
                "Busy",
                SHARE,
                "Share of the time in which a batch ran.",
                Query(of("ray_whisper_stage_busy", this), each),
                Query(of("whisper:stage_busy:avg", this), "mean"),
                most=1,
            ),
            graph(
                "Share of the GPU's time",
                SHARE,
                "In which its work held the GPU, by CUDA events.",
                Query(of("ray_whisper_stage_gpu_share", this), each),
                most=1,
            ),
            graph(
                "Fill",
                SHARE,
                "Of the batches' budget, or of the slots, that was used; and the SM utilization that full batches "
                "reach.",
                Query(of("ray_whisper_stage_fill", this), f"{each} fill"),
                Query(of("ray_whisper_stage_saturation", this), f"{each} saturation"),
                most=1,
            ),
            graph(
                "Budget",
                COUNT,
                "What a batch may hold now, in the stage's own unit: samples, windows, slots.",
                Query(of("ray_whisper_stage_budget", this), each),
                Query(
                    f"sum by (namespace, whisper_release) ({of('ray_whisper_stage_budget_at_bound', this)})",
                    "replicas at their bound",
                ),
            ),
            graph(
                "Queue",
                COUNT,
                "Windows that wait in the replica, and that run.",
                Query(of("ray_whisper_stage_queue_windows", this), f"{each} waiting"),
                Query(of("ray_whisper_stage_running_windows", this), f"{each} running"),
            ),
            graph(
                "Audio waiting",
                SECONDS,
                "Seconds of audio that wait for the stage, in replicas and at callers.",
                Query(of("whisper:stage_queue_audio_seconds:sum", this), "waiting"),
            ),
            graph(
                "Wait",
                SECONDS,
                "p99 in the replicas' queues, and how long the first of all that wait has waited.",
                Query(of("whisper:stage_wait_seconds:p99_5m", this), "p99"),
                Query(of("whisper:stage_oldest_wait_seconds:max", this), "oldest"),
            ),
            graph(
                "Latency",
                SECONDS,
                "From when a window asks for the stage until it has its result.",
                Query(of("whisper:stage_latency_seconds:p99_5m", this), "p99"),
                Query(of("whisper:stage_latency_seconds:p50_5m", this), "p50"),
            ),
            graph(
                "Batch size",
                COUNT,
                "Windows of a batch, or of a decoding step: mean and p90.",
                Query(of("whisper:stage_batch_windows:mean1m", this), "mean"),
                Query(
                    "histogram_quantile(0.9, sum by (le) "
                    f"(rate({of('ray_whisper_stage_batch_windows_bucket', this)}[$__rate_interval])))",
                    "p90",
                ),
            ),
            graph(
                "Windows",
                RATE,
                "Windows that left a replica, by what became of them.",
                Query(of("whisper:stage_windows:rate1m", this), "{{outcome}}"),
            ),
            graph(
                "Speed",
                COUNT,
                "Seconds of audio a second: what a replica does while it is busy, and what it does.",
                Query(of("ray_whisper_stage_rate", this), f"{each} busy"),
                Query(of("ray_whisper_stage_done_audio_seconds_per_second", this), f"{each} done"),
            ),
            graph(
                "Errors and retries",
                RATE,
                "Windows given up, and windows sent again.",
                Query(of("whisper:stage_errors:rate5m", this), "given up: {{reason}}"),
                Query(of("whisper:stage_retries:rate5m", this), "sent again: {{reason}}"),
            ),
        ],
    )


def gpus() -> str:
    gpu = "{{gpu}}"
    return dashboard(
        "whisper-gpus",
        "Whisper / GPUs",
        "What NVML says of each GPU, and which stages use it.",
        [
            Row(
                "Use",
                [
                    graph(
                        "SM utilization",
                        SHARE,
                        "Busy share of the multiprocessors (gpm), or of the time in which kernels ran (other kinds).",
                        Query(of("whisper:sm_utilization:max", 'kind!="cpu_busy"'), f"{gpu} ({{{{kind}}}})"),
                        most=1,
                    ),
                    graph(
                        "Use of what its stages can use",
                        SHARE,
                        "SM utilization over the lowest saturation of its stages, or memory bandwidth. Under 75 % "
                        "while windows wait is worth a look.",
                        Query(of("whisper:gpu_use:max"), gpu),
                    ),
                    graph(
                        "Windows waiting for it",
                        COUNT,
                        "In the queues of its replicas.",
                        Query(of("whisper:gpu_queue_windows:sum"), gpu),
                    ),
                    graph(
                        "Share of its time",
                        SHARE,
                        "In which a stage's work held the GPU; turns of other processes between its own count too.",
                        Query(
                            f"avg by (namespace, whisper_release, stage) ({of('ray_whisper_stage_gpu_share')})",
                            "{{stage}}",
                        ),
                        most=1,
                    ),
                    graph(
                        "SM occupancy",
                        SHARE,
                        "Warps on the multiprocessors, of as many as fit (Hopper and later).",
                        Query(f"max by (namespace, whisper_release, gpu) ({of('ray_whisper_sm_occupancy')})", gpu),
                        most=1,
                    ),
                    graph(
                        "Tensor Cores",
                        SHARE,
                        "Share of the time in which they worked (Hopper and later).",
                        Query(of("whisper:tensor_activity:max"), gpu),
                        most=1,
                    ),
                ],
            ),
            Row(
                "Memory",
                [
                    graph(
                        "Bandwidth in use",
                        SHARE,
                        "Of the memory's bandwidth (gpm), or of the time in which it was touched (other kinds).",
                        Query(of("whisper:dram_utilization:max"), f"{gpu} ({{{{kind}}}})"),
                        most=1,
                    ),
                    graph(
                        "Traffic",
                        "Bps",
                        "Hopper and later.",
                        Query(of("whisper:dram_bytes_per_second:max"), gpu),
                    ),
                    graph(
                        "Memory in use",
                        "bytes",
                        "By all processes, and all there is.",
                        Query(
                            f"max by (namespace, whisper_release, gpu) ({of('ray_whisper_gpu_memory_used_bytes')})", gpu
                        ),
                        Query(
                            f"max by (namespace, whisper_release, gpu) ({of('ray_whisper_gpu_memory_total_bytes')})",
                            f"{gpu} total",
                        ),
                    ),
                ],
            ),
            Row(
                "Card",
                [
                    graph(
                        "Power",
                        "watt",
                        "What it draws.",
                        Query(f"max by (namespace, whisper_release, gpu) ({of('ray_whisper_gpu_power_watts')})", gpu),
                    ),
                    graph(
                        "Temperature",
                        "celsius",
                        "Data-centre GPUs slow down a little above 85 °C.",
                        Query(of("whisper:gpu_temperature_celsius:max"), gpu),
                    ),
                    graph(
                        "Audio for a kilowatt hour",
                        "h",
                        "Hours of audio transcribed for each kilowatt hour that the GPUs draw.",
                        Query(
                            f"sum by (namespace, whisper_release) ({of('whisper:rtfx:rate1m')})"
                            f" / (sum by (namespace, whisper_release) ({of('whisper:gpu_power_watts:sum')}) / 1000)",
                            "{{namespace}}",
                        ),
                    ),
                ],
            ),
        ],
    )


def scaling() -> str:
    return dashboard(
        "whisper-scaling",
        "Whisper / Scaling",
        "What the autoscaling policy decides and why, in Ray Serve or in the controller on Kubernetes, and how the "
        "controller does.",
        [_decisions(), _controller()],
    )


def _decisions() -> Row:
    decisions = "whisper:scaling_decisions:rate5m"
    return Row(
        "Decisions",
        [
            *(
                graph(
                    f"{stage.capitalize()}: replicas",
                    COUNT,
                    "That the policy wants, that Serve counts as running, and that tell of themselves.",
                    Query(of("whisper:scaling_wanted_replicas:max", f'stage="{stage}"'), "wanted"),
                    Query(of("whisper:scaling_current_replicas:max", f'stage="{stage}"'), "running"),
                    Query(of("whisper:stage_replicas:count", f'stage="{stage}"'), "reporting"),
                )
                for stage in STAGES
            ),
            graph(
                "More and fewer",
                RATE,
                "Decisions that change the number, with their reasons (docs/scaling.md).",
                Query(of(decisions, 'direction!="hold"'), "{{stage}} {{direction}}: {{reason}}"),
            ),
            graph(
                "Reasons",
                RATE,
                "Of all decisions, those to stay included.",
                Query(f"sum by (namespace, whisper_release, reason) ({of(decisions)})", "{{reason}}"),
            ),
            graph(
                "Age of the readings",
                SECONDS,
                "Of the replica that has been silent for longest. Replicas set their gauges every second; ports and "
                "Prometheus add their periods.",
                Query(of("whisper:stage_reading_age_seconds:max"), "{{stage}}"),
            ),
        ],
    )


def _controller() -> Row:
    each = "{{instance}}"
    return Row(
        "Controller",
        [
            graph(
                "Leader",
                COUNT,
                "1 for the controller that holds the Lease; just one does.",
                Query(of("whisper_controller_leader"), each),
            ),
            graph(
                "Rounds by outcome",
                RATE,
                "ok and standby are well; any other names what is in the way.",
                Query(
                    "sum by (namespace, whisper_release, outcome) "
                    f"(rate({of('whisper_controller_ticks_total')}[$__rate_interval]))",
                    "{{outcome}}",
                ),
            ),
            graph(
                "Since the last round",
                SECONDS,
                "Of each controller, leader or not.",
                Query(f"time() - {of('whisper_controller_last_tick_timestamp_seconds')}", each),
            ),
            graph(
                "Age of its signals",
                SECONDS,
                "Since the newest reading of a stage's replica that it got from Prometheus.",
                Query(of("whisper_controller_signal_age_seconds"), "{{stage}}"),
            ),
            graph(
                "What it asked Serve for",
                RATE,
                "Requests to scale, by outcome.",
                Query(
                    "sum by (namespace, whisper_release, stage, outcome) "
                    f"(rate({of('whisper_controller_scale_requests_total')}[$__rate_interval]))",
                    "{{stage}} {{outcome}}",
                ),
            ),
            graph(
                "Configuration in force",
                COUNT,
                "0: the file is wrong, and what it said before is in force.",
                Query(of("whisper_controller_config_valid"), each),
            ),
        ],
    )
