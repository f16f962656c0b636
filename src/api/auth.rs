//! Who may call: bearer tokens, of which only SHA-256 hashes are kept.
//!
//! A token has a name, which operators' actions are recorded under, and a scope. Hashes of what came and what is known
//! are compared, so that the time a comparison takes tells nothing of a token. Left out on purpose: users, sessions
//! and expiry, which belong to a proxy in front.

use super::problem::{Kind, Problem};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use sha2::{Digest, Sha256};
use std::fmt::{self, Write};
use std::path::Path;
use std::sync::Arc;

/// Name of the token of the environment, and of its variable.
pub const ENVIRONMENT: &str = "ONCEBOX_API_TOKEN";
/// Longest name of a token.
const NAME_BYTES: usize = 64;
/// Longest token: a header is not for more.
const TOKEN_BYTES: usize = 1_024;

/// What a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Look.
    Read,
    /// Look and change.
    Operate,
}

impl Scope {
    /// By name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "read" => Some(Self::Read),
            "operate" => Some(Self::Operate),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
        }
    }

    /// What a method needs.
    pub(super) fn needed(method: &Method) -> Self {
        if method.is_safe() { Self::Read } else { Self::Operate }
    }
}

/// The caller of a request, for handlers to extract.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// Name of its token.
    pub name: Arc<str>,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // Only a route outside the guard has none.
        parts.extensions.get::<Self>().cloned().ok_or_else(|| unauthorized("this needs a token"))
    }
}

/// Why tokens cannot be used; one line.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct TokenError(String);

#[derive(Clone)]
struct Token {
    name: Arc<str>,
    scope: Scope,
    hash: [u8; 32],
}

/// The tokens that are valid.
#[derive(Clone, Default)]
pub struct Tokens(Vec<Token>);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|token| (&token.name, token.scope))).finish()
    }
}

impl Tokens {
    /// Reads a file of lines `name scope sha256:<hex>`; `#` begins a comment.
    ///
    /// # Errors
    /// Names the file, and the line.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path).map_err(|error| TokenError(format!("{}: {error}", path.display())))?;
        Self::parse(&text).map_err(|(line, reason)| TokenError(format!("{}, line {line}: {reason}", path.display())))
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut tokens = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let wrong = |reason: String| (index + 1, reason);
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, scope, hash] = words[..] else {
                return Err(wrong("must be: name scope sha256:<64 hexadecimal digits>".to_owned()));
            };
            check_name(name).map_err(|error| wrong(error.0))?;
            let scope = Scope::parse(scope)
                .ok_or_else(|| wrong(format!("scope \"{scope}\" is neither \"read\" nor \"operate\"")))?;
            // The line may hold a token in clear by mistake: it is not repeated.
            let hash = hash.strip_prefix("sha256:").and_then(from_hex).ok_or_else(|| {
                wrong("the third word must be sha256: and 64 hexadecimal digits; `oncebox token` makes them".to_owned())
            })?;
            let hash = <[u8; 32]>::try_from(hash).map_err(|_| wrong("a SHA-256 has 64 digits".to_owned()))?;
            if let Some(earlier) = tokens.0.iter().find(|token| &*token.name == name || token.hash == hash) {
                return Err(wrong(format!("its name or hash is \"{}\"'s too", earlier.name)));
            }
            tokens.0.push(Token { name: name.into(), scope, hash });
        }
        Ok(tokens)
    }

    /// Adds the token of the environment, with the scope operate.
    ///
    /// # Errors
    /// A token that no header could carry.
    pub fn with_environment(mut self, token: Option<&str>) -> Result<Self, TokenError> {
        let Some(token) = token else { return Ok(self) };
        if token.is_empty() || token.len() > TOKEN_BYTES || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError(format!("must be 1 to {TOKEN_BYTES} visible ASCII characters")));
        }
        self.0.push(Token { name: ENVIRONMENT.into(), scope: Scope::Operate, hash: hash(token.as_bytes()) });
        Ok(self)
    }

    /// Whose token the headers carry, if it may do what is needed.
    pub(super) fn admit(&self, headers: &HeaderMap, needed: Scope) -> Result<Caller, Problem> {
        if self.0.is_empty() {
            let detail = "no token is configured: start the server with ONCEBOX_API_TOKEN, or with a token file, \
                `tokens` under [api] in the config file";
            return Err(unauthorized(detail));
        }
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = match (values.next(), values.next()) {
            (None, _) => return Err(unauthorized("send the header Authorization: Bearer <token>")),
            (Some(_), Some(_)) => return Err(unauthorized("Authorization came more than once")),
            (Some(value), None) => value,
        };
        let malformed = || unauthorized("Authorization must be: Bearer <token>");
        let (scheme, token) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.contains(' ') {
            return Err(malformed());
        }
        let came = hash(token.as_bytes());
        let found = self.0.iter().find(|known| known.hash == came);
        let token = found.ok_or_else(|| unauthorized("the token is not known here"))?;
        if token.scope < needed {
            let detail = format!(
                "the token \"{}\" has the scope {}, this needs {}",
                token.name,
                token.scope.name(),
                needed.name()
            );
            return Err(Problem::new(Kind::Forbidden, detail));
        }
        Ok(Caller { name: Arc::clone(&token.name) })
    }
}

/// Names are words that the lists and the log show.
///
/// # Errors
/// Says what a name is.
pub fn check_name(name: &str) -> Result<(), TokenError> {
    let word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._@-".contains(&byte));
    if !word || name.is_empty() || name.len() > NAME_BYTES {
        let reason = format!("\"{name}\" is no name: 1 to {NAME_BYTES} letters, digits, and any of . _ @ -");
        return Err(TokenError(reason));
    }
    if name == ENVIRONMENT {
        return Err(TokenError(format!("the name {ENVIRONMENT} is taken by the variable")));
    }
    Ok(())
}

/// A token's line for the file.
pub fn line(name: &str, scope: Scope, token: &str) -> String {
    format!("{name} {} sha256:{}", scope.name(), hex(&hash(token.as_bytes())))
}

/// Bytes as two digits each.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of two digits each.
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn unauthorized(detail: &str) -> Problem {
    Problem::new(Kind::Unauthorized, detail).header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a file of tokens says which line is wrong, and never repeats what may be a secret.
    #[test]
    fn token_files_name_the_wrong_line() {
        let good = line("ops", Scope::Operate, "secret");
        for (text, at, reason) in [
            ("ops operate".to_owned(), 1, "must be: name scope sha256:"),
            (format!("# tokens\n\nops admin {}", &good[12..]), 3, "scope \"admin\" is neither"),
            ("ops read se-cret".to_owned(), 1, "the third word must be sha256:"),
            ("ops read sha256:abcd".to_owned(), 1, "a SHA-256 has 64 digits"),
            ("o/s read sha256:abcd".to_owned(), 1, "\"o/s\" is no name"),
            (format!("{good}\n{good}"), 2, "its name or hash is \"ops\"'s too"),
            (good.replace("ops", ENVIRONMENT), 1, "is taken by the variable"),
        ] {
            let (line, said) = Tokens::parse(&text).expect_err(&text);
            assert!(line == at && said.contains(reason) && !said.contains("se-cret"), "{text}: {line}: {said}");
        }
        assert_eq!(Tokens::parse(&format!("# x\n {good} # y\n\n")).expect("valid").0.len(), 1);
    }

    /// Goal: scopes include those below them, and a header is read strictly.
    #[test]
    fn tokens_admit_by_scope() {
        let tokens = Tokens::parse(&line("eye", Scope::Read, "r")).expect("valid");
        let tokens = tokens.with_environment(Some("o")).expect("valid");
        let admit = |value: &str, needed| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).expect("a value"));
            tokens.admit(&headers, needed).map(|caller| caller.name.to_string()).map_err(|_| ())
        };
        assert_eq!(admit("Bearer r", Scope::Read).as_deref(), Ok("eye"));
        assert_eq!(admit("bearer  o", Scope::Operate).as_deref(), Ok(ENVIRONMENT));
        assert_eq!(admit("Bearer r", Scope::Operate), Err(()));
        for wrong in ["", "Bearer", "Bearer ", "Basic o", "o", "Bearer o o", "Bearer x"] {
            assert_eq!(admit(wrong, Scope::Read), Err(()), "{wrong:?}");
        }
        assert!(Tokens::default().admit(&HeaderMap::new(), Scope::Read).is_err());
        assert!(Tokens::default().with_environment(Some("a b")).is_err());
    }
}
