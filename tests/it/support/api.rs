//! `oncebox serve` with tokens, and a client that shows answers as they came over the wire.

use super::{LIMIT, Lab, Process};
use serde_json::Value;
use std::collections::HashMap;
use std::process::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The token of the environment: everything.
pub const OPERATE: &str = "operate-token";
/// The token of the file: look only. Its name is `eye`.
pub const READ: &str = "read-token";
/// What the file says of it.
pub const READ_LINE: &str = "eye read sha256:0328587016f9e316b9c31c94f944a2c453e1494a564062b5eab68039c75b58bf";

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// By name in lower case.
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    /// The body, if the answer is a problem in every respect; fails the test if it is none.
    pub fn problem(&self, status: u16, kind: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let problem = self.json();
        assert_eq!(problem["type"], format!("/problems/{kind}"), "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
        problem
    }
}

/// Sends bytes, and reads the answer until the connection ends.
pub async fn raw(address: &str, request: &[u8]) -> Answer {
    let answer = async {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(request).await.expect("it reads");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.expect("an answer");
        parse(&bytes)
    };
    tokio::time::timeout(LIMIT, answer).await.expect("an answer in time")
}

fn parse(bytes: &[u8]) -> Answer {
    let text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    Answer { status, headers, body: body.to_owned() }
}

/// The head and the body of a request that ends its connection.
pub fn request(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        text += &format!("content-length: {}\r\n", body.len());
    }
    format!("{text}\r\n{body}").into_bytes()
}

/// A server and its address.
pub struct Api {
    pub process: Process,
    pub address: String,
}

impl Api {
    /// With [`OPERATE`] and [`READ`].
    pub async fn start(lab: &Lab) -> Self {
        Self::start_with(lab, "").await
    }

    /// The same, with more lines of `[api]` in the config file, and what follows them.
    pub async fn start_with(lab: &Lab, more: &str) -> Self {
        let tokens = lab.config(&format!("# who looks\n{READ_LINE}\n"));
        let config = lab.config(&format!("[api]\ntokens = {tokens:?}\n{more}"));
        let mut command = lab.command(&["serve", "--config", &config]);
        command.env("ONCEBOX_API_TOKEN", OPERATE);
        Self::spawn(command).await
    }

    /// As the command says, on a free port.
    pub async fn spawn(mut command: Command) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let address = format!("127.0.0.1:{port}");
        command.args(["--listen", &address]);
        let process = Process::spawn(command);
        process.wait_for_log("serving").await;
        Self { process, address }
    }

    /// A request with these headers and this body.
    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        raw(&self.address, &request(&self.address, method, path, headers, body)).await
    }

    /// A request with a token and no body.
    pub async fn ask(&self, method: &str, path: &str, token: &str) -> Answer {
        self.send(method, path, &[("authorization", &format!("Bearer {token}"))], "").await
    }

    /// What a GET with [`READ`] finds.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, READ).await
    }

    /// A POST of JSON with [`OPERATE`].
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string()).await
    }

    /// A POST of what is said to be JSON, with [`OPERATE`].
    pub async fn post_text(&self, path: &str, body: &str) -> Answer {
        let token = format!("Bearer {OPERATE}");
        self.send("POST", path, &[("authorization", &token), ("content-type", "application/json")], body).await
    }
}
