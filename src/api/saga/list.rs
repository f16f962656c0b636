//! The list of sagas, by filters.

use super::super::ApiState;
use super::super::page::{Listing, Page, PageParams};
use super::super::problem::Problem;
use super::super::request::Params;
use super::text::Time;
use crate::saga::read::{self, Filter, Summary};
use crate::saga::state::SagaStatus;
use axum::extract::State;
use axum::http::Uri;
use utoipa::IntoParams;
use uuid::Uuid;

/// Most labels of one filter: more than a saga may have never match.
const LABELS: usize = 32;

/// The parameters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct FilterParams {
    /// Of this status; several apart by commas.
    #[param(
        required = false,
        example = "running,stuck",
        pattern = "^(scheduled|running|completed|compensating|compensated|cancelled|stuck|terminated)(,(scheduled|running|completed|compensating|compensated|cancelled|stuck|terminated))*$"
    )]
    status: String,
    /// Of this definition, in any version.
    #[param(required = false, max_length = 100, min_length = 1)]
    definition: String,
    /// With this business key.
    #[param(required = false, max_length = 255, min_length = 1)]
    business_key: String,
    /// Made after this time.
    #[param(required = false, format = DateTime)]
    created_after: String,
}

fn filter(params: &mut Params) -> Result<Filter, Problem> {
    let wrong = |name: &str, detail: String| Problem::parameters(vec![(name.to_owned(), detail)]);
    let mut filter = Filter {
        definition: params.text("definition", 100)?,
        business_key: params.text("business_key", 255)?,
        created_after_us: params.parsed::<Time>("created_after")?.map(|time| time.micros),
        ..Filter::default()
    };
    for word in params.text("status", 256)?.iter().flat_map(|text| text.split(',')) {
        let status = SagaStatus::ALL.into_iter().find(|status| status.as_str() == word.trim());
        let known = || SagaStatus::ALL.map(SagaStatus::as_str).join(", ");
        filter.statuses.push(status.ok_or_else(|| wrong("status", format!("\"{word}\" is none of {}", known())))?);
    }
    for (label, value) in params.prefixed("label.") {
        if label.is_empty() {
            return Err(wrong("label.", "must name a label: label.NAME=VALUE".to_owned()));
        }
        let name = format!("label.{label}");
        if filter.labels.insert(label, value.into()).is_some() {
            return Err(wrong(&name, "came more than once".to_owned()));
        }
        if filter.labels.len() > LABELS {
            return Err(wrong(&name, format!("at most {LABELS} labels")));
        }
    }
    Ok(filter)
}

/// Sagas, the newest first.
///
/// Labels narrow the list as `label.NAME=VALUE`. Entries lack the saga's input and steps.
#[utoipa::path(
    get, path = "/v1/sagas", tag = "sagas", operation_id = "listSagas", params(FilterParams, PageParams),
    responses(
        (
            status = 200, description = "A page.", body = Listing<Summary>,
            headers(("Link" = String, description = "The next page, `rel=\"next\"`, if there is one.")),
        ),
    )
)]
pub(super) async fn sagas(
    State(state): State<ApiState>,
    mut params: Params,
    uri: Uri,
) -> Result<Listing<Summary>, Problem> {
    let filter = filter(&mut params)?;
    let page = Page::take(&mut params, &uri)?;
    params.finish()?;
    let (after, limit) = (page.after::<Uuid>()?, page.fetch());
    let sagas =
        state.sessions.run(move |conn| Box::pin(async move { Ok(read::list(conn, &filter, after, limit).await?) }));
    Ok(page.cut(sagas.await?, |saga| saga.id))
}
