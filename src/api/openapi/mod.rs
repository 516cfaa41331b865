//! The API's description for programs: an OpenAPI 3.1 document.

mod examples;

use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::{RequestBody, RequestBodyBuilder};
use utoipa::openapi::response::{Response, ResponseBuilder, ResponsesBuilder};
use utoipa::openapi::schema::{AllOfBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, HttpMethod, PathItem, Ref, RefOr, Required, Schema};

use self::examples::Examples;
use super::answer::{ChatChunk, ChatCompletion, Completion, Detokenized, ModelCard, ModelList, Tokenized};
use super::error::ErrorBody;
use super::wire::{ChatBody, CompletionBody, DetokenizeBody, FormatBody, OptionsBody, TokenizeBody};

/// The name of the key that requests carry.
const KEY: &str = "key";

#[derive(OpenApi)]
#[openapi(components(schemas(
    ChatBody,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionBody,
    DetokenizeBody,
    Detokenized,
    ErrorBody,
    FormatBody,
    ModelCard,
    ModelList,
    OptionsBody,
    TokenizeBody,
    Tokenized,
)))]
struct Schemas;

/// The document, as JSON.
pub fn openapi() -> String {
    let mut document = Schemas::openapi();
    "moewe".clone_into(&mut document.info.title);
    env!("CARGO_PKG_VERSION").clone_into(&mut document.info.version);
    let about = "OpenAI's API as DeepSeek and vLLM extend it. Fields that are not described here are ignored, except \
                 those that would change the answer and cannot be honoured, which are refused by name. Mistakes in \
                 bodies have status 400.";
    document.info.description = Some(about.to_owned());
    document.info.license = None;
    let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    document.components.get_or_insert_default().add_security_scheme(KEY, key);
    let mut paths = PathsBuilder::new();
    for route in routes() {
        for path in route.paths {
            let item = PathItem::new(route.method.clone(), route.operation(path));
            paths = paths.path(*path, item);
        }
    }
    document.paths = paths.build();
    document.to_json().expect("a document can be written")
}

/// What there is at some paths.
struct Route {
    /// The first is the usual one; the others are the same.
    paths: &'static [&'static str],
    method: HttpMethod,
    /// What it does, in a line.
    summary: &'static str,
    /// Which schemas the request has together, and examples of it.
    request: Option<(&'static [&'static str], Examples)>,
    answer: Answer,
    /// Whether it needs a key if the server has keys.
    key: bool,
}

/// What a path answers.
enum Answer {
    /// JSON of a schema.
    Json(&'static str),
    /// JSON of a schema, or, for a stream, events of another.
    Events(&'static str, &'static str),
    /// A text of a media type.
    Text(&'static str),
    /// Only a status.
    Status,
    /// A websocket.
    Socket,
}

fn routes() -> Vec<Route> {
    let get =
        |paths, summary, answer, key| Route { paths, method: HttpMethod::Get, summary, request: None, answer, key };
    let post = |paths, summary, schemas, examples, answer| {
        let request = Some((schemas, examples));
        Route { paths, method: HttpMethod::Post, summary, request, answer, key: true }
    };
    vec![
        post(
            &["/v1/chat/completions", "/chat/completions", "/beta/chat/completions"],
            "Continues a conversation.",
            &["OptionsBody", "FormatBody", "ChatBody"],
            examples::CHAT,
            Answer::Events("ChatCompletion", "ChatChunk"),
        ),
        post(
            &["/v1/completions", "/completions", "/beta/completions"],
            "Continues texts, or fills a gap in them.",
            &["OptionsBody", "FormatBody", "CompletionBody"],
            examples::COMPLETION,
            Answer::Events("Completion", "Completion"),
        ),
        get(&["/v1/models", "/models"], "Tells which models there are.", Answer::Json("ModelList"), true),
        get(&["/v1/models/{id}", "/models/{id}"], "Tells of a model.", Answer::Json("ModelCard"), true),
        post(
            &["/tokenize"],
            "Tells the tokens of a text.",
            &["TokenizeBody"],
            examples::TOKENIZE,
            Answer::Json("Tokenized"),
        ),
        post(
            &["/detokenize"],
            "Tells the text of tokens.",
            &["DetokenizeBody"],
            examples::DETOKENIZE,
            Answer::Json("Detokenized"),
        ),
        get(
            &["/v1/watch"],
            "Shows what experts and latents do while requests run, if the server allows it.",
            Answer::Socket,
            true,
        ),
        get(&["/health"], "Tells that the server is alive.", Answer::Status, false),
        get(&["/ready"], "Tells whether the server takes requests: 503 while it loads or ends.", Answer::Status, false),
        get(&["/metrics"], "Tells Prometheus how the server does.", Answer::Text("text/plain"), true),
        get(&["/openapi.json"], "This document.", Answer::Json("Document"), true),
        get(&["/"], "A page to chat with the model.", Answer::Text("text/html"), false),
    ]
}

impl Route {
    fn operation(&self, path: &str) -> Operation {
        let id = match path.trim_matches('/') {
            "" => "page".to_owned(),
            path => path.replace(['/', '.'], "_").replace(['{', '}'], ""),
        };
        let method = if self.request.is_some() { "post" } else { "get" };
        let mut operation = OperationBuilder::new()
            .operation_id(Some(format!("{method}_{id}")))
            .summary(Some(self.summary))
            .request_body(self.request.as_ref().map(|(schemas, examples)| request(schemas, examples)))
            .security(if self.key { SecurityRequirement::new::<_, [&str; 0], _>(KEY, []) } else { <_>::default() });
        if path.contains("{id}") {
            operation = operation.parameter(parameter("id", ParameterIn::Path, "The model's name."));
        }
        if matches!(self.answer, Answer::Socket) {
            let what = "What to show, a list with commas between, such as `routing,latents`.";
            operation = operation.parameter(parameter("taps", ParameterIn::Query, what));
        }
        let (status, answer) = self.answer.response();
        let responses = ResponsesBuilder::new().response(status, answer).response("default", error());
        operation.responses(responses.build()).build()
    }
}

impl Answer {
    fn response(&self) -> (&'static str, Response) {
        let ok = |what: &str| ResponseBuilder::new().description(what.to_owned());
        match self {
            Self::Json("Document") => {
                let any = ObjectBuilder::new().schema_type(Type::Object).build();
                ("200", ok("The document").content("application/json", Content::new(Some(any))).build())
            }
            Self::Json(schema) => ("200", ok("The answer").content("application/json", of(schema)).build()),
            Self::Events(whole, piece) => {
                let what = "The answer; with `stream` its pieces as server-sent events, the last of which is `[DONE]`";
                let answer = ok(what).content("application/json", of(whole)).content("text/event-stream", of(piece));
                ("200", answer.build())
            }
            Self::Text(media) => {
                let text = ObjectBuilder::new().schema_type(Type::String).build();
                ("200", ok("The text").content(*media, Content::new(Some(text))).build())
            }
            Self::Status => ("200", ok("Yes").build()),
            Self::Socket => ("101", ok("A websocket of frames, encoded as recordings are").build()),
        }
    }
}

fn reference(schema: &str) -> RefOr<Schema> {
    Ref::from_schema_name(schema).into()
}

fn of(schema: &str) -> Content {
    Content::new(Some(reference(schema)))
}

/// A body that has the fields of all `schemas`.
fn request(schemas: &[&str], examples: &Examples) -> RequestBody {
    let schema = if let [schema] = schemas {
        reference(schema)
    } else {
        let all = schemas.iter().fold(AllOfBuilder::new(), |all, schema| all.item(reference(schema)));
        RefOr::T(Schema::AllOf(all.build()))
    };
    let mut content = Content::new(Some(schema));
    content.examples = examples::read(examples);
    RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True)).build()
}

fn parameter(name: &str, place: ParameterIn, description: &str) -> utoipa::openapi::path::Parameter {
    let text = ObjectBuilder::new().schema_type(Type::String).build();
    let required = if place == ParameterIn::Path { Required::True } else { Required::False };
    let parameter = ParameterBuilder::new().name(name).parameter_in(place).required(required);
    parameter.description(Some(description)).schema(Some(text)).build()
}

/// Any answer other than the one hoped for.
fn error() -> Response {
    let what = "A mistake of the client (4xx) or a misfortune of the server (5xx). 429 and 503 say by Retry-After when \
                to try again.";
    ResponseBuilder::new().description(what).content("application/json", of("ErrorBody")).build()
}
