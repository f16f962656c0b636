//! Lists by the page: `limit`, an opaque `cursor`, and a `Link` to the next page.
//!
//! Pages are cut by key (keyset): a page begins behind the last entry of the one before, whatever came or went between
//! them, and a far page costs what the first does.

use super::auth;
use super::problem::Problem;
use super::request::Params;
use axum::Json;
use axum::http::{HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::{IntoParams, ToSchema};

/// Entries of a page unless the client says otherwise.
const DEFAULT_LIMIT: i64 = 50;
/// Most entries of a page.
pub(super) const MAX_LIMIT: i64 = 200;
/// Longest cursor.
const CURSOR_BYTES: usize = 2_048;

/// The parameters as the description shows them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub(super) struct PageParams {
    /// Entries of a page.
    #[param(minimum = 1, maximum = 200, default = 50, required = false)]
    limit: i64,
    /// Where the page begins: as the `Link` of the page before it says.
    #[param(max_length = 2048, required = false)]
    cursor: String,
}

/// Which page is asked for.
#[derive(Debug)]
pub(super) struct Page {
    limit: i64,
    cursor: Option<String>,
    uri: Uri,
}

/// One page.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Listing<T> {
    /// The entries, in the list's order.
    pub items: Vec<T>,
    /// The cursor of the next page; none on the last. The header `Link` has it as a URL.
    #[schema(required = true)]
    pub next: Option<String>,
    #[serde(skip)]
    link: Option<HeaderValue>,
}

impl Page {
    /// Takes `limit` and `cursor`.
    ///
    /// # Errors
    /// 400 when one of them is wrong.
    pub(super) fn take(params: &mut Params, uri: &Uri) -> Result<Self, Problem> {
        let limit = params.number("limit", 1..=MAX_LIMIT)?.unwrap_or(DEFAULT_LIMIT);
        Ok(Self { limit, cursor: params.text("cursor", CURSOR_BYTES)?, uri: uri.clone() })
    }

    /// How many rows to fetch: one more than the page holds tells whether there is another page.
    pub(super) fn fetch(&self) -> i64 {
        self.limit + 1
    }

    /// The key of the last entry of the page before.
    ///
    /// # Errors
    /// 400 when the cursor is none that this list gave out.
    pub(super) fn after<K: DeserializeOwned>(&self) -> Result<Option<K>, Problem> {
        let Some(cursor) = &self.cursor else { return Ok(None) };
        let key = auth::from_hex(cursor).and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match key {
            Some(key) => Ok(Some(key)),
            None => {
                let detail = "is no cursor of this list: take it from `next` or from the header Link".to_owned();
                Err(Problem::parameters(vec![("cursor".to_owned(), detail)]))
            }
        }
    }

    /// The page of what was fetched by [`Page::fetch`].
    pub(super) fn cut<T, K: Serialize>(&self, mut rows: Vec<T>, key: impl Fn(&T) -> K) -> Listing<T> {
        let whole = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let more = rows.len() > whole;
        rows.truncate(whole);
        let last = if more { rows.last() } else { None };
        let next = last.and_then(|row| serde_json::to_vec(&key(row)).ok()).map(|key| auth::hex(&key));
        let link = next.as_ref().and_then(|next| HeaderValue::try_from(self.link(next)).ok());
        Listing { items: rows, next, link }
    }

    /// The URL that was asked for, with another cursor.
    fn link(&self, next: &str) -> String {
        let query = self.uri.query().unwrap_or_default();
        let others = query.split('&').filter(|pair| !pair.is_empty() && pair.split('=').next() != Some("cursor"));
        let cursor = format!("cursor={next}");
        let query: Vec<&str> = others.chain([cursor.as_str()]).collect();
        format!("<{}?{}>; rel=\"next\"", self.uri.path(), query.join("&"))
    }
}

impl<T: Serialize> IntoResponse for Listing<T> {
    fn into_response(mut self) -> Response {
        let link = self.link.take();
        let mut response = Json(self).into_response();
        if let Some(link) = link {
            response.headers_mut().insert(header::LINK, link);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(query: &str) -> Page {
        let uri: Uri = format!("/v1/x?{query}").parse().expect("a URI");
        Page::take(&mut Params::new(Some(query)).expect("readable"), &uri).expect("a page")
    }

    /// Goal: the link of a page leads behind its last entry, with the other parameters as they were.
    #[test]
    fn links_lead_on() {
        let first = page("limit=2&topic=a%23b");
        let listing = first.cut(vec![(1, "ä"), (2, "b"), (3, "c")], |(number, text)| (*number, text.to_string()));
        assert_eq!(listing.items.len(), 2);
        let next = listing.next.expect("there is more");
        let link = listing.link.expect("a link");
        assert_eq!(link.to_str().ok(), Some(&*format!("</v1/x?limit=2&topic=a%23b&cursor={next}>; rel=\"next\"")));
        let second = page(&format!("cursor={next}&limit=2"));
        assert_eq!(second.after::<(i64, String)>().expect("valid"), Some((2, "b".to_owned())));
        assert!(second.after::<(String, String)>().is_err(), "a cursor of another list");
        assert!(page("cursor=zz").after::<i64>().is_err());
        let last = second.cut(vec![(3, "c")], |(number, _)| *number);
        assert!(last.next.is_none() && last.link.is_none());
    }
}
