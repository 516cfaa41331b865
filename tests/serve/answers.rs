//! Requests as they should be.

use serde_json::{Value, json};

use crate::harness::{chat, shared};

/// Content, reasoning and finish reason of a choice of a stream.
fn joined(chunks: &[Value], index: u64) -> (String, Value) {
    let mut text = String::new();
    let mut finish = Value::Null;
    for chunk in chunks {
        for choice in chunk["choices"].as_array().unwrap() {
            if choice["index"] == index {
                assert_eq!(finish, Value::Null, "more behind the end: {choice}");
                text += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
                finish = choice["finish_reason"].clone();
            }
        }
    }
    (text, finish)
}

#[test]
fn a_chat_streams_what_it_answers_whole() {
    let server = shared();
    let body = chat("The king said to", &json!({ "max_tokens": 30, "temperature": 0.9 }));
    let whole = server.json("/v1/chat/completions", &body);
    let message = &whole["choices"][0]["message"];
    assert_eq!((&whole["object"], &message["role"]), (&json!("chat.completion"), &json!("assistant")));
    assert_eq!(whole["model"], "demo");
    let chunks = server.stream("/v1/chat/completions", &body).all();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(chunks.len() > 5, "it comes in pieces: {}", chunks.len());
    for chunk in &chunks {
        assert_eq!((&chunk["object"], &chunk["id"]), (&json!("chat.completion.chunk"), &chunks[0]["id"]));
        assert_eq!(chunk["usage"], Value::Null);
    }
    let (text, finish) = joined(&chunks, 0);
    assert_eq!((&json!(text), &finish), (&message["content"], &whole["choices"][0]["finish_reason"]));
    // Under all paths.
    for path in ["/chat/completions", "/beta/chat/completions"] {
        assert_eq!(server.json(path, &body)["choices"], whole["choices"], "{path}");
    }
}

#[test]
fn usage_and_cost_add_up() {
    let server = shared();
    // A text that nobody asked before, so that the cache has none of it but the template's beginning.
    let body = chat("Pelicans nest on chalk cliffs", &json!({ "max_tokens": 5, "temperature": 0 }));
    let check = |usage: &Value| {
        let number = |field: &str| usage[field].as_u64().unwrap();
        let (hit, miss) = (number("prompt_cache_hit_tokens"), number("prompt_cache_miss_tokens"));
        assert_eq!(number("prompt_tokens"), hit + miss, "{usage}");
        assert_eq!(number("total_tokens"), number("prompt_tokens") + number("completion_tokens"), "{usage}");
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], hit);
        assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 0);
        // Picounits, exactly.
        let cost = hit * 250_000 + miss * 1_000_000 + number("completion_tokens") * 2_000_000;
        assert!((usage["cost"].as_f64().unwrap() * 1e12 - cost as f64).abs() < 0.5, "{usage}");
        hit
    };
    let first = server.json("/v1/chat/completions", &body);
    let hit = check(&first["usage"]);
    let mut streamed = body.clone();
    streamed["stream_options"] = json!({ "include_usage": true });
    let chunks = server.stream("/v1/chat/completions", &streamed).all();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
    assert!(check(&last["usage"]) > hit, "the second time the cache has the prompt: {last}");
    assert_eq!(last["usage"]["completion_tokens"], first["usage"]["completion_tokens"]);
}

#[test]
fn choices_are_those_of_the_seeds_behind_each_other() {
    let server = shared();
    let body = |seed: u64, n: u32| chat("A fox", &json!({ "max_tokens": 8, "temperature": 1.3, "seed": seed, "n": n }));
    let single: Vec<Value> = (40..44)
        .map(|seed| server.json("/v1/chat/completions", &body(seed, 1))["choices"][0]["message"].clone())
        .collect();
    let whole = server.json("/v1/chat/completions", &body(40, 4));
    for (index, (choice, single)) in whole["choices"].as_array().unwrap().iter().zip(&single).enumerate() {
        assert_eq!((&choice["index"], &choice["message"]), (&json!(index), single));
    }
    let chunks = server.stream("/v1/chat/completions", &body(40, 4)).all();
    for (index, single) in (0..).zip(&single) {
        assert_eq!(single["content"], joined(&chunks, index).0);
    }
    // Without a seed, each is another text.
    let unseeded = || {
        let mut body = body(0, 1);
        body.as_object_mut().unwrap().remove("seed");
        body["max_tokens"] = 24.into();
        server.json("/v1/chat/completions", &body)["choices"].clone()
    };
    assert_ne!(unseeded(), unseeded());
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_in_it() {
    let server = shared();
    let free = chat("The king said to", &json!({ "max_tokens": 40, "temperature": 0 }));
    let whole = server.json("/v1/chat/completions", &free);
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let mut body = free.clone();
    body["stop"] = json!([stop, "never said"]);
    let stopped = server.json("/v1/chat/completions", &body);
    assert_eq!(stopped["choices"][0]["message"]["content"], before);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let tokens = |answer: &Value| answer["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(tokens(&stopped) < tokens(&whole), "what comes behind is not paid for");
    let chunks = server.stream("/v1/chat/completions", &body).all();
    assert_eq!(joined(&chunks, 0), (before.to_owned(), json!("stop")));
    server.quiet();
}

#[test]
fn log_probabilities_belong_to_the_tokens_of_the_text() {
    let server = shared();
    let body = chat("The king", &json!({ "max_tokens": 12, "logprobs": true, "top_logprobs": 3, "temperature": 0 }));
    let whole = server.json("/v1/chat/completions", &body);
    let choice = &whole["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    let bytes = entries.iter().flat_map(|entry| entry["bytes"].as_array().unwrap().clone());
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), choice["message"]["content"].as_str().unwrap());
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // The likeliest is taken.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&entry["token"], &entry["logprob"]));
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    // In a stream, those of the text that comes with them.
    let mut streamed = Vec::new();
    for chunk in server.stream("/v1/chat/completions", &body).all() {
        let choice = &chunk["choices"][0];
        let entries = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        let text: String = entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
        assert_eq!(text, choice["delta"]["content"].as_str().unwrap_or_default());
        streamed.extend(entries);
    }
    assert_eq!(&streamed, entries);
    // Completions have them in another form.
    let body = json!({ "prompt": "The king", "max_tokens": 6, "logprobs": 2, "temperature": 0 });
    let choice = server.json("/v1/completions", &body)["choices"][0].clone();
    let list = |field: &str| choice["logprobs"][field].as_array().unwrap().clone();
    let tokens = list("tokens");
    assert_eq!(
        tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>(),
        choice["text"].as_str().unwrap()
    );
    assert!(list("top_logprobs").iter().all(|top| top.as_object().unwrap().len() <= 2));
    let mut offset = 0;
    for (token, at) in tokens.iter().zip(list("text_offset")) {
        assert_eq!(at, offset);
        offset += token.as_str().unwrap().chars().count();
    }
}

#[test]
fn experts_are_told_of_every_token() {
    let server = shared();
    let body =
        chat("The king said to", &json!({ "max_tokens": 9, "routed_experts": true, "logit_bias": { "1": -100 } }));
    let whole = server.json("/v1/chat/completions", &body);
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    let shape = |experts: &Value| {
        let tokens = experts.as_array().unwrap();
        for token in tokens {
            assert_eq!(token.as_array().unwrap().len(), 3);
            for layer in token.as_array().unwrap() {
                assert!(layer.as_array().unwrap().iter().all(|expert| expert.as_u64().unwrap() < 32), "{layer}");
                assert_eq!(layer.as_array().unwrap().len(), 4);
            }
        }
        tokens.len()
    };
    let experts = &whole["choices"][0]["routed_experts"];
    assert_eq!((shape(experts), shape(&whole["prompt_routed_experts"])), (9, prompt));
    let mut streamed = Vec::new();
    let mut of_prompt = Vec::new();
    for chunk in server.stream("/v1/chat/completions", &body).all() {
        streamed.extend(chunk["choices"][0]["routed_experts"].as_array().cloned().unwrap_or_default());
        of_prompt.extend(chunk["prompt_routed_experts"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!((&json!(streamed), &json!(of_prompt)), (experts, &whole["prompt_routed_experts"]));
}

#[test]
fn completions_answer_each_prompt_n_times() {
    let server = shared();
    let prompts = ["The king", "In the beginning", "{\"id\":"];
    let one = |prompt: &str, seed: u64| {
        let body = json!({ "prompt": prompt, "max_tokens": 6, "seed": seed, "echo": true });
        server.json("/v1/completions", &body)["choices"][0]["text"].clone()
    };
    let body = json!({ "prompt": prompts, "n": 2, "max_tokens": 6, "seed": 3, "echo": true });
    let whole = server.json("/v1/completions", &body);
    assert_eq!(whole["object"], "text_completion");
    let chunks = server.stream("/completions", &body).all();
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let prompt = prompts[index / 2];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], one(prompt, 3 + index as u64 % 2), "{prompt}");
        assert!(choice["text"].as_str().unwrap().starts_with(prompt));
        assert_eq!(choice["text"], joined(&chunks, index as u64).0);
    }
    assert_eq!(whole["choices"].as_array().unwrap().len(), 6);
    let expected: usize = prompts
        .iter()
        .map(|prompt| server.json("/tokenize", &json!({ "prompt": prompt }))["count"].as_u64().unwrap() as usize)
        .sum();
    assert_eq!(whole["usage"]["prompt_tokens"], expected, "each prompt is paid for once");
    // More answers than may run at once.
    let many: Vec<String> = (0..80).map(|number| format!("Item {number}")).collect();
    let whole = server.json("/v1/completions", &json!({ "prompt": many, "max_tokens": 1 }));
    assert_eq!(whole["choices"].as_array().unwrap().len(), 80);
    // As ids.
    let ids = server.json("/tokenize", &json!({ "prompt": "The king" }))["tokens"].clone();
    let body = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 6, "seed": 3 });
    let of = |prompt: Value| server.json("/v1/completions", &body(prompt))["choices"].clone();
    assert_eq!(of(ids), of(json!("The king")));
}

#[test]
fn answers_keep_to_a_schema() {
    let server = shared();
    let schema = json!({
        "type": "object", "properties": { "name": { "enum": ["fox", "king"] }, "age": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["name", "age"], "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "who", "schema": schema, "strict": true } });
    for seed in 0..4 {
        let body =
            chat("Who?", &json!({ "response_format": format, "max_tokens": 60, "seed": seed, "temperature": 1.5 }));
        let whole = server.json("/v1/chat/completions", &body);
        assert_eq!(whole["choices"][0]["finish_reason"], "stop", "{whole}");
        let said: Value = serde_json::from_str(whole["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
        assert!(jsonschema::is_valid(&schema, &said), "{said}");
    }
}

#[test]
fn what_there_is_can_be_asked() {
    let server = shared();
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "demo");
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    assert_eq!(server.get("/models/demo").json(), models["data"][0]);
    assert_eq!(server.get("/v1/models/other").error()["code"], "model_not_found");
    assert_eq!((server.get("/health").status, server.get("/ready").status), (200, 200));
    assert_eq!(server.ask("HEAD", "/health", "", b"").status, 200);
    assert!(server.get("/openapi.json").json()["paths"]["/v1/chat/completions"].is_object());
    let metrics = server.get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(metrics.text().contains("vllm:num_requests_running{model_name=\"demo\"}"));
    let page = server.get("/");
    assert!(page.header("content-type").unwrap().starts_with("text/html"), "{page:?}");
    let text = "The king said: \"Grüße, 世界 🦊\"";
    let tokens = server.json("/tokenize", &json!({ "prompt": text, "add_special_tokens": false }))["tokens"].clone();
    assert_eq!(server.json("/detokenize", &json!({ "tokens": tokens }))["prompt"], text);
}

#[test]
fn many_clients_are_answered_as_each_alone() {
    let server = shared();
    let ask = |number: u64| {
        let body = chat(&format!("Story {}", number % 5), &json!({ "max_tokens": 10 + number, "seed": number % 7 }));
        server.json("/v1/chat/completions", &body)["choices"].clone()
    };
    let together: Vec<Value> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..24).map(|number| scope.spawn(move || ask(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for number in [0, 5, 11, 23] {
        assert_eq!(together[number as usize], ask(number), "{number}");
    }
}
