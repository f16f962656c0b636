//! The API's description: the resources' parts, and what all operations have in common.

use super::problem::{CONTENT_TYPE, Kind};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, PathItem, Ref, RefOr, Response, ResponseBuilder, path::Operation};

/// Name of the security scheme.
const BEARER: &str = "bearer";

/// A reference to the problem of this kind, for operations to list.
macro_rules! listed {
    ($name:ident, $response:literal) => {
        pub(super) struct $name;

        impl<'r> utoipa::ToResponse<'r> for $name {
            fn response() -> (&'r str, RefOr<Response>) {
                ($response, RefOr::Ref(Ref::from_response_name($response)))
            }
        }
    };
}

listed!(NotFound, "not-found");
listed!(Gone, "gone");
listed!(Stale, "stale");
listed!(PreconditionRequired, "precondition-required");

/// Problems that the guard of all requests answers.
const OF_ALL: [Kind; 6] =
    [Kind::Malformed, Kind::Unauthorized, Kind::Forbidden, Kind::UriTooLong, Kind::Internal, Kind::Unavailable];
/// Problems of operations that read a body.
const OF_BODIES: [Kind; 3] = [Kind::TooLarge, Kind::UnsupportedMediaType, Kind::Invalid];

/// The API's description as `openapi/openapi.yaml` holds it.
pub fn openapi_yaml() -> String {
    description().to_yaml().expect("the description is serialisable")
}

/// The same as JSON.
pub fn openapi_json() -> String {
    description().to_json().expect("the description is serialisable")
}

fn description() -> OpenApi {
    let mut parts = super::resources().into_iter().map(|(_, part)| part);
    let mut all = parts.next().unwrap_or_default();
    for part in parts {
        all.merge(part);
    }
    for (path, item) in &mut all.paths.paths {
        let is_open = !path.starts_with("/v1/");
        for operation in operations(item) {
            complete(operation, is_open);
        }
    }
    let components = all.components.get_or_insert_default();
    for kind in Kind::ALL {
        components.responses.insert(component(kind), RefOr::T(response(kind)));
    }
    let mut http = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
    http = http.description(Some("A token of the scope `read` may GET, one of the scope `operate` may do everything."));
    components.add_security_scheme(BEARER, SecurityScheme::Http(http.build()));
    all
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = item;
    [get, put, post, delete, patch].into_iter().flatten()
}

/// Adds who may call, and the problems that are not the operation's own.
fn complete(operation: &mut Operation, is_open: bool) {
    let kinds = match is_open {
        true => vec![Kind::Malformed, Kind::UriTooLong],
        false => {
            operation.security = Some(vec![SecurityRequirement::new::<_, [&str; 0], &str>(BEARER, [])]);
            let bodies = if operation.request_body.is_some() { &OF_BODIES[..] } else { &[] };
            OF_ALL.iter().chain(bodies).copied().collect()
        }
    };
    if is_open {
        operation.security = Some(Vec::new());
    }
    for kind in kinds {
        let status = kind.words().0.to_string();
        let reference = || RefOr::Ref(Ref::from_response_name(component(kind)));
        operation.responses.responses.entry(status).or_insert_with(reference);
    }
}

/// `/problems/not-found` is `not-found`.
fn component(kind: Kind) -> String {
    kind.words().1.trim_start_matches("/problems/").to_owned()
}

fn response(kind: Kind) -> Response {
    let (status, uri, title, meaning) = kind.words();
    let example = serde_json::json!({ "type": uri, "title": title, "status": status, "detail": meaning });
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).example(Some(example)).build();
    ResponseBuilder::new().description(meaning).content(CONTENT_TYPE, content).build()
}
