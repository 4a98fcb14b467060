"""What /metrics tells is what happened, under vLLM's names."""

from __future__ import annotations

from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from served import Served, until
from tinychat import make_tokenizer

# Names and kinds of vLLM's metrics that this server has as well.
VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "counter",
}


def test_every_metric_is_there_and_counts() -> None:
    engine = FakeEngine(make_tokenizer(), width=3)
    with Served(engine) as served:
        assert served.chat(max_tokens=8, stop=None).status == 200
        assert served.chat(max_tokens=7, stream=True).status == 200
        served.chat(max_tokens=9, stop=[engine.asked[0].text[0]])
        until(lambda: served.metric("vllm:request_success_total", finished_reason="stop") == 1)
        answer = served.ask("/metrics")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert {name: families[name].type for name in VLLM} == VLLM
        ours = {name for name in families if name not in VLLM and not name.endswith("_created")}
        assert ours == {"specdec:kv_cache_utilisation", "specdec:passes"}

        done = [each.stats for each in engine.asked]
        assert served.metric("vllm:request_success_total", finished_reason="length") == 2
        assert served.metric("vllm:generation_tokens_total") == sum(each.num_tokens for each in done)
        assert served.metric("vllm:spec_decode_num_drafts_total") == sum(each.num_drafts for each in done)
        assert served.metric("vllm:spec_decode_num_draft_tokens_total") == sum(each.num_draft_tokens for each in done)
        accepted = sum(each.num_accepted_tokens for each in done)
        assert served.metric("vllm:spec_decode_num_accepted_tokens_total") == accepted
        by_position = [
            served.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(2)
        ]
        assert sum(by_position) == accepted
        assert by_position[0] > by_position[1] > 0
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
            assert served.metric(f"vllm:{name}_count") == 3
        assert served.metric("vllm:request_generation_tokens_sum") == sum(each.num_tokens for each in done)
        passes = sum(each.num_drafts for each in done)
        assert served.metric("vllm:inter_token_latency_seconds_count") == passes - 3
    engine.close()


def test_two_servers_in_one_process_count_for_themselves() -> None:
    engine, other = FakeEngine(make_tokenizer()), FakeEngine(make_tokenizer())
    with Served(engine) as served, Served(other) as beside:
        served.chat()
        assert served.metric("vllm:e2e_request_latency_seconds_count") == 1
        assert beside.metric("vllm:e2e_request_latency_seconds_count") == 0
    engine.close()
    other.close()
