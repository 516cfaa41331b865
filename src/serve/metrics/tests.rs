#![allow(clippy::float_cmp)] // counts and halves, which doubles hold exactly

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;

/// A sample's labels.
type Set = BTreeMap<String, String>;

/// What Prometheus makes of a page, or why it would not.
#[derive(Debug, Default)]
struct Page {
    kinds: BTreeMap<String, String>,
    samples: Vec<(String, Set, f64)>,
}

impl Page {
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |set: &Set| labels.iter().all(|(key, value)| set.get(*key).is_some_and(|found| found == value));
        let found: Vec<_> = self.samples.iter().filter(|sample| sample.0 == name && matches(&sample.1)).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].2
    }
}

fn is_name(name: &str, colons: bool) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || (colons && c == ':'))
}

fn labels(text: &str) -> Result<(Set, &str), String> {
    let Some(mut rest) = text.strip_prefix('{') else { return Ok((Set::new(), text)) };
    let mut set = Set::new();
    while !rest.starts_with('}') {
        let (key, value) = rest.split_once("=\"").ok_or("no value")?;
        let mut content = String::new();
        let mut chars = value.char_indices();
        let end = loop {
            match chars.next().ok_or("open string")? {
                (at, '"') => break at,
                (_, '\\') => match chars.next().ok_or("open escape")?.1 {
                    'n' => content.push('\n'),
                    c @ ('\\' | '"') => content.push(c),
                    c => return Err(format!("escape {c}")),
                },
                (_, c) => content.push(c),
            }
        };
        if !is_name(key, false) || set.insert(key.into(), content).is_some() {
            return Err(format!("label {key}"));
        }
        rest = &value[end + 1..];
        rest = rest.strip_prefix(',').filter(|more| !more.starts_with('}')).unwrap_or(rest);
    }
    Ok((set, &rest[1..]))
}

/// A strict reader of the text format 0.0.4.
fn parse(text: &str) -> Result<Page, String> {
    if !text.ends_with('\n') {
        return Err("no newline at the end".into());
    }
    let mut page = Page::default();
    let mut family = String::new();
    let (mut helped, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        let fail = |what: &str| Err(format!("{what}: {line}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, _) = rest.split_once(' ').ok_or("help without text")?;
            if !helped.insert(name.to_owned()) {
                return fail("second help");
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or("type without kind")?;
            if !["counter", "gauge", "histogram"].contains(&kind) || !is_name(name, true) || !helped.contains(name) {
                return fail("kind, name or help");
            }
            if kind == "counter" && !name.ends_with("_total") {
                return fail("counter's name");
            }
            if page.kinds.insert(name.into(), kind.into()).is_some() {
                return fail("second type");
            }
            family = name.into();
        } else if line.starts_with('#') {
            return fail("comment");
        } else {
            let end = line.find(['{', ' ']).ok_or("no value")?;
            let name = &line[..end];
            let (set, value) = labels(&line[end..])?;
            let value = value.strip_prefix(' ').ok_or("no space")?;
            let value: f64 = value.parse().map_err(|_| format!("value {value}"))?;
            let kind = page.kinds.get(&family).ok_or("no family")?;
            let suffix = name.strip_prefix(family.as_str()).ok_or(format!("{name} in {family}"))?;
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            if !suffixes.contains(&suffix) || !seen.insert((name.to_owned(), set.clone())) {
                return fail("suffix, or the same again");
            }
            page.samples.push((name.into(), set, value));
        }
    }
    for (name, _) in page.kinds.iter().filter(|(_, kind)| *kind == "histogram") {
        let bucket = format!("{name}_bucket");
        let steps: Vec<_> = page.samples.iter().filter(|sample| sample.0 == bucket).collect();
        let bounds: Vec<f64> = steps.iter().map(|step| step.1["le"].trim_start_matches('+').parse().unwrap()).collect();
        let rising = steps.is_sorted_by(|a, b| a.2 <= b.2) && bounds.is_sorted_by(|a, b| a < b);
        let count = page.value(&format!("{name}_count"), &[]);
        if !rising || bounds.last() != Some(&f64::INFINITY) || steps.last().map(|step| step.2) != Some(count) {
            return Err(format!("buckets of {name}"));
        }
    }
    Ok(page)
}

fn numbers() -> EngineNumbers {
    EngineNumbers {
        running: 3,
        waiting: 2,
        pages: 100,
        free_pages: 60,
        cached_pages: 15,
        hit_tokens: 640,
        miss_tokens: 360,
        new_tokens: 77,
        preempted: 1,
        acceptance: vec![(50, 36), (36, 10)],
    }
}

#[test]
fn has_the_names_that_dashboards_expect() {
    let metrics = Metrics::new("demo", 4096);
    metrics.add_http_request("/v1/chat/completions", 200);
    metrics.add_cost("alice", "0.5".parse().unwrap());
    let page = parse(&metrics.render(&numbers())).unwrap();
    let kinds: BTreeMap<&str, &str> = page.kinds.iter().map(|(name, kind)| (name.as_str(), kind.as_str())).collect();
    for (kind, names) in [
        ("gauge", "vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc moewe_kv_cache_pages"),
        (
            "counter",
            "vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:prompt_tokens_total \
            vllm:generation_tokens_total vllm:request_success_total vllm:num_preemptions_total \
            vllm:spec_decode_num_drafts_total vllm:spec_decode_num_draft_tokens_total \
            vllm:spec_decode_num_accepted_tokens_total vllm:spec_decode_num_accepted_tokens_per_pos_total \
            moewe_cost_total moewe_ledger_failures_total moewe_http_requests_total",
        ),
        (
            "histogram",
            "vllm:time_to_first_token_seconds vllm:inter_token_latency_seconds vllm:e2e_request_latency_seconds \
            vllm:request_queue_time_seconds vllm:request_prefill_time_seconds vllm:request_decode_time_seconds \
            vllm:request_prompt_tokens vllm:request_generation_tokens",
        ),
    ] {
        for name in names.split_whitespace() {
            assert_eq!(kinds.get(name), Some(&kind), "{name}");
            let own = page.samples.iter().filter(|sample| sample.0.starts_with(name)).collect::<Vec<_>>();
            assert!(!own.is_empty() && own.iter().all(|sample| sample.1["model_name"] == "demo"), "{name}: {own:?}");
        }
    }
}

#[test]
fn tells_what_the_engine_counts() {
    let metrics = Metrics::new("demo", 4096);
    for _ in 0..2 {
        let page = parse(&metrics.render(&numbers())).unwrap();
        let value = |name: &str| page.value(name, &[]);
        assert_eq!((value("vllm:num_requests_running"), value("vllm:num_requests_waiting")), (3.0, 2.0));
        assert_eq!(value("vllm:kv_cache_usage_perc"), 0.25);
        assert_eq!(page.value("moewe_kv_cache_pages", &[("state", "free")]), 60.0);
        assert_eq!((value("vllm:prefix_cache_queries_total"), value("vllm:prefix_cache_hits_total")), (1000.0, 640.0));
        assert_eq!((value("vllm:prompt_tokens_total"), value("vllm:generation_tokens_total")), (1000.0, 77.0));
        assert_eq!(value("vllm:spec_decode_num_drafts_total"), 50.0);
        assert_eq!(value("vllm:spec_decode_num_draft_tokens_total"), 86.0);
        assert_eq!(value("vllm:spec_decode_num_accepted_tokens_total"), 46.0);
        let at = |position| page.value("vllm:spec_decode_num_accepted_tokens_per_pos_total", &[("position", position)]);
        assert_eq!((at("0"), at("1")), (36.0, 10.0));
    }
    // Before the engine is there, nothing is divided by nothing, and counters do not fall.
    let page = parse(&metrics.render(&EngineNumbers::default())).unwrap();
    assert_eq!(page.value("vllm:kv_cache_usage_perc", &[]), 0.0);
    assert_eq!(page.value("vllm:generation_tokens_total", &[]), 77.0);
}

#[test]
fn times_a_request() {
    let metrics = Metrics::new("demo", 4096);
    let arrived = Instant::now();
    let after = |milliseconds| arrived + Duration::from_millis(milliseconds);
    let mut times = RequestTimes::new(arrived);
    times.began = Some(after(500));
    for at in [2000, 2030, 2090] {
        metrics.observe_tokens(&mut times, after(at));
    }
    metrics.observe_request(&times, after(2100), Ended::Length, 100, 3);
    // One that never began.
    metrics.observe_request(&RequestTimes::new(arrived), after(700), Ended::Abort, 7, 0);
    let page = parse(&metrics.render(&EngineNumbers::default())).unwrap();
    let close = |name: &str, count: f64, sum: f64| {
        assert_eq!(page.value(&format!("{name}_count"), &[]), count, "{name}");
        assert!((page.value(&format!("{name}_sum"), &[]) - sum).abs() < 1e-6, "{name}");
    };
    close("vllm:time_to_first_token_seconds", 1.0, 2.0);
    close("vllm:inter_token_latency_seconds", 2.0, 0.09);
    close("vllm:e2e_request_latency_seconds", 2.0, 2.8);
    close("vllm:request_queue_time_seconds", 2.0, 1.2);
    close("vllm:request_prefill_time_seconds", 1.0, 1.5);
    close("vllm:request_decode_time_seconds", 1.0, 0.09);
    close("vllm:request_prompt_tokens", 2.0, 107.0);
    assert_eq!(page.value("vllm:inter_token_latency_seconds_bucket", &[("le", "0.05")]), 1.0);
    let ended = |reason| page.value("vllm:request_success_total", &[("finished_reason", reason)]);
    assert_eq!([ended("stop"), ended("length"), ended("abort"), ended("error")], [0.0, 1.0, 1.0, 0.0]);
}

#[test]
fn any_model_name_gives_a_page_that_parses() {
    for name in ["a\"b\\c\nd}{,=", "ä 模型", "", "# EOF"] {
        let metrics = Metrics::new(name, 1);
        metrics.add_cost("alice", "12.5".parse().unwrap());
        metrics.add_http_request("/", 404);
        metrics.add_http_request("/", 404);
        metrics.add_ledger_failure();
        let page = parse(&metrics.render(&numbers())).unwrap();
        assert!(page.samples.iter().all(|sample| sample.1["model_name"] == name), "{name:?}");
        assert_eq!(page.value("moewe_cost_total", &[("key", "alice")]), 12.5);
        assert_eq!(page.value("moewe_http_requests_total", &[("path", "/"), ("status", "404")]), 2.0);
    }
}

#[test]
fn the_checker_is_strict() {
    let head = "# HELP a_total A.\n# TYPE a_total counter\n";
    assert!(parse(&format!("{head}a_total{{x=\"1\"}} 1\n")).is_ok());
    for bad in
        ["a_total 1", "b_total 1\n", "a_total{x=\"1} 1\n", "a_total 1\na_total 1\n", "a_total x\n", "# EOF\n", "a 1\n"]
    {
        assert!(parse(&format!("{head}{bad}")).is_err(), "{bad}");
    }
    assert!(parse("# HELP a A.\n# TYPE a counter\na_total 1\n").is_err());
}

#[test]
fn lengths_go_up_to_the_context() {
    assert_eq!(lengths(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    assert_eq!(lengths(0), [1.0]);
    assert_eq!(lengths(u64::MAX).len(), 57);
}
