//! Definitions of sagas: put once, never changed.

use super::super::ApiState;
use super::super::auth::Caller;
use super::super::etag::Condition;
use super::super::limits;
use super::super::openapi;
use super::super::page::{Listing, Page, PageParams};
use super::super::problem::{Kind, Problem, ProblemBody};
use super::super::request::{NoParams, Params, field_error, media_type, read_body};
use super::PathParts;
use crate::saga::definition::{Definition, Fault, document_from_text};
use crate::saga::read::{self, DefinitionSummary};
use crate::saga::store::{self, Defined, Undefined};
use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;

/// Media types of YAML: the registered one, and those from before it was.
const YAML: [&str; 4] = ["application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"];

/// A document's tag: its hash.
fn tag(hash: &str) -> HeaderValue {
    HeaderValue::try_from(format!("\"{hash}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// Definitions by name, each with its versions, the newest first.
#[utoipa::path(
    get, path = "/v1/definitions", tag = "definitions", operation_id = "listDefinitions", params(PageParams),
    responses((
        status = 200, description = "A page.", body = Listing<DefinitionSummary>,
        headers(("Link" = String, description = "The next page, `rel=\"next\"`, if there is one.")),
    ))
)]
pub(super) async fn list(
    State(state): State<ApiState>,
    mut params: Params,
    uri: Uri,
) -> Result<Listing<DefinitionSummary>, Problem> {
    let page = Page::take(&mut params, &uri)?;
    params.finish()?;
    let (after, limit) = (page.after::<String>()?, page.fetch());
    let definitions = state
        .sessions
        .run(move |conn| Box::pin(async move { Ok(read::definitions(conn, after.as_deref(), limit).await?) }));
    Ok(page.cut(definitions.await?, |definition| definition.name.clone()))
}

/// A definition with its versions.
///
/// One that is named `validate` is found in the list alone.
#[utoipa::path(
    get, path = "/v1/definitions/{name}", tag = "definitions", operation_id = "getDefinition",
    params(("name" = String, Path, description = "Its name.", example = "order")),
    responses(
        (status = 200, description = "The definition.", body = DefinitionSummary),
        (status = 404, response = openapi::NotFound),
    )
)]
pub(super) async fn show(
    State(state): State<ApiState>,
    path: PathParts,
    _: NoParams,
) -> Result<Json<DefinitionSummary>, Problem> {
    let name = path.text("name").to_owned();
    let found = state.sessions.run(move |conn| {
        Box::pin(async move {
            let none = || Problem::not_found(format!("there is no definition \"{name}\""));
            Ok(read::definition(conn, &name).await?.ok_or_else(none)?)
        })
    });
    Ok(Json(found.await?))
}

/// The document of one version, as JSON.
#[utoipa::path(
    get, path = "/v1/definitions/{name}/versions/{version}", tag = "definitions", operation_id = "getDefinitionVersion",
    params(
        ("name" = String, Path, description = "Its name.", example = "order"),
        ("version" = i32, Path, description = "Its version.", minimum = 1, example = 1),
    ),
    responses(
        (
            status = 200, description = "The document.", body = Object,
            headers(("ETag" = String, description = "Its hash, in quotes.")),
            example = json!({"name": "order", "version": 1, "steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]}),
        ),
        (status = 304, description = "It is as it was: it never changes."),
        (status = 404, response = openapi::NotFound),
    )
)]
pub(super) async fn document(
    State(state): State<ApiState>,
    path: PathParts,
    _: NoParams,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (name, version) = version_of(&path)?;
    let condition = Condition::if_none_match(&headers)?;
    let found = state.sessions.run(move |conn| {
        Box::pin(async move {
            let none = || Problem::not_found(format!("there is no definition \"{name}\" version {version}"));
            Ok(read::document(conn, &name, version).await?.ok_or_else(none)?)
        })
    });
    let found = found.await?;
    let is_known = match condition {
        Condition::Missing => false,
        Condition::Any => true,
        Condition::Tags(tags) => tags.iter().any(|(_, tag)| *tag == found.hash),
    };
    if is_known {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag(&found.hash))]).into_response());
    }
    Ok(answer(StatusCode::OK, &found))
}

fn answer(status: StatusCode, found: &read::Document) -> Response {
    let document: &RawValue = &found.document;
    (status, [(header::ETAG, tag(&found.hash))], Json(document)).into_response()
}

/// Puts a definition under a version, for good.
///
/// As JSON or YAML; `name` and `version` may be left out of the document. The same again is 200.
#[utoipa::path(
    put, path = "/v1/definitions/{name}/versions/{version}", tag = "definitions", operation_id = "putDefinitionVersion",
    params(
        ("name" = String, Path, description = "Its name.", example = "order"),
        ("version" = i32, Path, description = "Its version.", minimum = 1, example = 1),
        ("If-None-Match" = Option<String>, Header, description = "`*`: only if there is none yet.", example = "*", pattern = "^\\*$"),
    ),
    request_body(content(
        (Object = "application/json", example = json!({"steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]})),
        (String = "application/yaml", example = "steps:\n- id: charge\n  do: {topic: pay.charge, body: {}}\n"),
    )),
    responses(
        (status = 200, description = "It is there already, the same; the document.", body = Object, headers(("ETag" = String, description = "Its hash, in quotes.")), example = json!({"name": "order", "version": 1, "steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]})),
        (status = 201, description = "It is put; the document.", body = Object, headers(("ETag" = String, description = "Its hash, in quotes."), ("Location" = String, description = "Its path.")), example = json!({"name": "order", "version": 1, "steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]})),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "Another document has this version.", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, response = openapi::Stale),
        (status = 422, description = "It is no definition; `errors` says everything that is wrong.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn define(
    State(state): State<ApiState>,
    caller: Caller,
    path: PathParts,
    _: NoParams,
    headers: HeaderMap,
    Text(text): Text,
) -> Result<Response, Problem> {
    let (name, version) = version_of(&path)?;
    let only_new = match Condition::if_none_match(&headers)? {
        Condition::Missing => false,
        Condition::Any => true,
        Condition::Tags(_) => {
            return Err(Problem::new(Kind::Malformed, "If-None-Match: only * can be asked for here"));
        }
    };
    let mut document = document_from_text(&text).map_err(faulty)?;
    of_path(&mut document, &name, version)?;
    Definition::parse(&document).map_err(faulty)?;
    let location = HeaderValue::try_from(format!("/v1/definitions/{name}/versions/{version}"));
    let (defined, found) = state
        .sessions
        .run(move |conn| {
            Box::pin(async move {
                let defined = store::define(conn, &name, version, &document, Some(&caller.name)).await?;
                let again =
                    || Problem::unavailable(format!("definition \"{name}\" version {version} was removed meanwhile"));
                let found = read::document(conn, &name, version).await?.ok_or_else(again)?;
                Ok((defined, found))
            })
        })
        .await?;
    match defined {
        Defined::New => {
            let mut response = answer(StatusCode::CREATED, &found);
            if let Ok(location) = location {
                response.headers_mut().insert(header::LOCATION, location);
            }
            Ok(response)
        }
        Defined::AlreadySame | Defined::Conflict if only_new => {
            Err(Problem::new(Kind::Stale, "there is a definition of this name and version"))
        }
        Defined::AlreadySame => Ok(answer(StatusCode::OK, &found)),
        Defined::Conflict => {
            let detail =
                "another document has this name and version: a definition never changes, put it under the next version";
            Err(Problem::new(Kind::Conflict, detail).with("hash", found.hash))
        }
    }
}

/// Name and version of the path are those of the document, which may leave them out.
fn of_path(document: &mut Value, name: &str, version: i32) -> Result<(), Problem> {
    let Value::Object(fields) = document else { return Ok(()) };
    for (field, value) in [("name", Value::from(name)), ("version", Value::from(version))] {
        let found = fields.entry(field).or_insert_with(|| value.clone());
        if *found != value {
            return Err(Problem::invalid(format!("/{field}"), format!("is {found}, the path says {value}")));
        }
    }
    Ok(())
}

/// Removes a definition that no saga has.
#[utoipa::path(
    delete, path = "/v1/definitions/{name}/versions/{version}", tag = "definitions", operation_id = "deleteDefinitionVersion",
    params(
        ("name" = String, Path, description = "Its name.", example = "order"),
        ("version" = i32, Path, description = "Its version.", minimum = 1, example = 1),
    ),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, response = openapi::NotFound),
        (status = 409, description = "Sagas follow it, or did and are still kept.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn remove(State(state): State<ApiState>, path: PathParts, _: NoParams) -> Result<StatusCode, Problem> {
    let (name, version) = version_of(&path)?;
    let removed = state.sessions.run(move |conn| {
        Box::pin(async move {
            match store::undefine(conn, &name, version).await? {
                Undefined::Removed => Ok(StatusCode::NO_CONTENT),
                Undefined::NotThere => {
                    Err(Problem::not_found(format!("there is no definition \"{name}\" version {version}")).into())
                }
                Undefined::InUse(words) => Err(Problem::new(Kind::Conflict, words).into()),
            }
        })
    });
    removed.await
}

/// What is valid.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Valid {
    /// True: what is not valid is answered 422.
    #[schema(example = true)]
    valid: bool,
    /// The definition's name.
    #[schema(example = "order")]
    name: String,
    /// Its version.
    #[schema(example = 3)]
    version: i32,
    /// Its steps, each after those it waits for.
    #[schema(example = json!(["reserve", "charge"]))]
    steps: Vec<String>,
}

/// Says whether a document is a definition, and stores nothing.
#[utoipa::path(
    post, path = "/v1/definitions/validate", tag = "definitions", operation_id = "validateDefinition",
    request_body(content(
        (Object = "application/json", example = json!({"name": "order", "version": 1, "steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]})),
        (String = "application/yaml", example = "name: order\nversion: 1\nsteps:\n- id: charge\n  do: {topic: pay.charge, body: {}}\n"),
    )),
    responses(
        (status = 200, description = "It is.", body = Valid),
        (status = 422, description = "It is not; `errors` says everything that is wrong.", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(super) async fn validate(_: NoParams, Text(text): Text) -> Result<Json<Valid>, Problem> {
    let document = document_from_text(&text).map_err(faulty)?;
    let Definition { name, version, steps, .. } = Definition::parse(&document).map_err(faulty)?;
    Ok(Json(Valid { valid: true, name, version, steps: steps.into_iter().map(|step| step.id).collect() }))
}

fn faulty(faults: Vec<Fault>) -> Problem {
    let mut words: Vec<String> = faults.iter().take(3).map(ToString::to_string).collect();
    if faults.len() > words.len() {
        words.push(format!("and {} more", faults.len() - words.len()));
    }
    let errors = faults.iter().map(|fault| field_error(&fault.pointer, &fault.detail)).collect();
    Problem::new(Kind::Invalid, words.join("; ")).errors(errors)
}

fn version_of(path: &PathParts) -> Result<(String, i32), Problem> {
    let (name, version) = (path.text("name"), path.text("version"));
    match version.parse() {
        Ok(number) if number >= 1 && !version.starts_with('+') => Ok((name.to_owned(), number)),
        _ => Err(Problem::not_found(format!("\"{version}\" is no version: versions are numbers from 1"))),
    }
}

/// A body in JSON or YAML, as text.
#[derive(Debug)]
pub(super) struct Text(String);

impl<S: Sync> FromRequest<S> for Text {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let known = |kind: &str| kind == "application/json" || kind.ends_with("+json") || YAML.contains(&kind);
        if !media_type(&parts.headers).is_some_and(|kind| known(&kind)) {
            limits::discard(body);
            let detail = "send the definition as Content-Type: application/json or application/yaml";
            return Err(Problem::new(Kind::UnsupportedMediaType, detail));
        }
        Self::read(&parts.headers, body).await
    }
}

impl Text {
    async fn read(headers: &HeaderMap, body: Body) -> Result<Self, Problem> {
        let bytes = read_body(headers, body).await?;
        let text = String::from_utf8(bytes);
        text.map(Self).map_err(|error| Problem::new(Kind::Malformed, format!("the body is no UTF-8: {error}")))
    }
}
