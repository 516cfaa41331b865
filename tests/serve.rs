//! `moewe serve`: what clients of OpenAI's and DeepSeek's APIs are answered, what happens to bad requests and bad clients,
//! and how it ends.

#[path = "common/cli.rs"]
mod cli;
#[path = "serve/mod.rs"]
mod harness;
#[path = "data/serve/model.rs"]
mod model;

#[path = "serve/answers.rs"]
mod answers;
#[path = "serve/clients.rs"]
mod clients;
#[path = "serve/ending.rs"]
mod ending;
#[path = "serve/everything.rs"]
mod everything;
#[path = "serve/keys.rs"]
mod keys;
#[path = "serve/wrong.rs"]
mod wrong;
