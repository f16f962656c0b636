//! An HTTP endpoint that records what it gets and answers as it is told.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Call {
    pub line: String,
    pub fields: HashMap<String, String>,
    pub body: Vec<u8>,
    pub at: Instant,
}

impl Call {
    pub fn key(&self) -> &str {
        &self.fields["idempotency-key"]
    }

    pub fn number(&self) -> i64 {
        let value: serde_json::Value = serde_json::from_slice(&self.body).expect("JSON");
        value["n"].as_i64().expect("a number")
    }
}

/// What is answered, after how long; no answer at all if it hangs.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub fields: String,
    pub body: Vec<u8>,
    pub after: Duration,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self { status, fields: String::new(), body: Vec::new(), after: Duration::ZERO }
    }
}

type Answering = Box<dyn Fn(&Call) -> Reply + Send + Sync>;

struct State {
    answering: Answering,
    calls: Mutex<Vec<Call>>,
    accepted: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

pub struct Endpoint {
    port: u16,
    state: Arc<State>,
    task: Option<JoinHandle<()>>,
}

impl Endpoint {
    pub async fn answering(answering: impl Fn(&Call) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let state = Arc::new(State {
            answering: Box::new(answering),
            calls: Mutex::default(),
            accepted: AtomicUsize::new(0),
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        });
        let mut endpoint = Self { port, state, task: None };
        endpoint.listen(listener);
        endpoint
    }

    fn listen(&mut self, listener: TcpListener) {
        let state = Arc::clone(&self.state);
        self.task = Some(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                state.accepted.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(stream, Arc::clone(&state)));
            }
        }));
    }

    /// Ends it: its port refuses connections.
    pub async fn down(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    /// Listens again on the same port.
    pub async fn up(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(([127, 0, 0, 1], self.port).into()).expect("its port again");
        self.listen(socket.listen(128).expect("listens"));
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.calls.lock().expect("whole").clone()
    }

    /// Connections it has taken.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::SeqCst)
    }

    /// Most requests it had at a time.
    pub fn most_at_a_time(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }

    /// Different keys it has seen.
    pub fn keys(&self) -> HashSet<String> {
        self.calls().iter().map(|call| call.key().to_owned()).collect()
    }
}

async fn serve(mut stream: TcpStream, state: Arc<State>) {
    let mut buffer = Vec::new();
    while let Some(call) = request(&mut stream, &mut buffer).await {
        state.most.fetch_max(state.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let reply = (state.answering)(&call);
        state.calls.lock().expect("whole").push(call);
        tokio::time::sleep(reply.after).await;
        state.now.fetch_sub(1, Ordering::SeqCst);
        let head =
            format!("HTTP/1.1 {} X\r\n{}content-length: {}\r\n\r\n", reply.status, reply.fields, reply.body.len());
        if stream.write_all(&[head.as_bytes(), &reply.body].concat()).await.is_err() {
            break;
        }
    }
}

async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Call> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..end].to_vec()).expect("ASCII");
    let mut lines = head.split("\r\n");
    let line = lines.next().expect("a request line").to_owned();
    let mut fields = HashMap::new();
    for (name, value) in lines.map(|line| line.split_once(": ").expect("a field")) {
        assert_eq!(fields.insert(name.to_ascii_lowercase(), value.to_owned()), None, "{name} came twice:\n{head}");
    }
    let length: usize = fields.get("content-length").map_or(0, |length| length.parse().expect("a number"));
    while buffer.len() < end + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer[end + 4..end + 4 + length].to_vec();
    buffer.drain(..end + 4 + length);
    Some(Call { line, fields, body, at: Instant::now() })
}
