//! Goal: a saga's history is streamed as it happens, resumes where it was cut, and ends.

use crate::saga_api::{define, happen, reply, started};
use crate::support::api::{Api, READ, request};
use crate::support::{LIMIT, Lab, eventually};
use oncebox::saga::state::{Event, Operator, Outcome};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An event stream.
struct Stream {
    stream: TcpStream,
    text: String,
}

/// One event: its id, its name and its data.
type Sent = (String, String, Value);

impl Stream {
    async fn open(api: &Api, path: &str, headers: &[(&str, &str)]) -> Self {
        let token = format!("Bearer {READ}");
        let headers = [&[("authorization", token.as_str())], headers].concat();
        let mut stream = TcpStream::connect(&api.address).await.expect("it listens");
        stream.write_all(&request(&api.address, "GET", path, &headers, "")).await.expect("it reads");
        let mut stream = Self { stream, text: String::new() };
        let head = stream.until("\r\n\r\n").await.expect("a head");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.to_ascii_lowercase().contains("content-type: text/event-stream"), "{head}");
        stream
    }

    /// The text before this one; none at the end.
    async fn until(&mut self, end: &str) -> Option<String> {
        loop {
            if let Some((before, after)) = self.text.split_once(end) {
                let before = before.to_owned();
                self.text = after.to_owned();
                return Some(before);
            }
            let mut bytes = vec![0; 16 << 10];
            let read = tokio::time::timeout(LIMIT, self.stream.read(&mut bytes)).await.expect("something in time");
            match read.expect("readable") {
                0 => return None,
                n => self.text += std::str::from_utf8(&bytes[..n]).expect("UTF-8"),
            }
        }
    }

    /// The next event; none at the end. What HTTP puts between chunks is no field of an event.
    async fn next(&mut self) -> Option<Sent> {
        loop {
            let text = self.until("\n\n").await?;
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().trim().to_owned()
            };
            if !field("event:").is_empty() {
                return Some((field("id:"), field("event:"), serde_json::from_str(&field("data:")).expect("JSON")));
            }
        }
    }
}

/// Goal: rows come as they are written, with their numbers as ids; a stream that was cut goes on behind the last one;
/// the end of the saga ends the stream with an event that says so.
#[tokio::test]
async fn history_is_streamed() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    let events = format!("{path}/events");
    let mut stream = Stream::open(&api, &events, &[]).await;
    let (seq, event, data) = stream.next().await.expect("a row");
    assert_eq!((seq.as_str(), event.as_str(), &data["seq"]), ("1", "created", &json!(1)));
    let row = api.get(&format!("{path}/history")).await.json()["items"][0].clone();
    assert_eq!(data, row, "the data is the history's row");
    happen(&lab, id, Event::Due {}).await;
    let (seq, event, _) = stream.next().await.expect("a row");
    assert_eq!((seq.as_str(), event.as_str()), ("2", "due"));
    drop(stream);
    happen(&lab, id, reply("reserve", Outcome::Succeeded)).await;
    happen(&lab, id, Event::Cancel(Operator { who: "me".into(), why: "x\ny".into() })).await;
    let mut stream = Stream::open(&api, &events, &[("last-event-id", "2")]).await;
    let rows = [stream.next().await.expect("a row"), stream.next().await.expect("a row")];
    assert_eq!((rows[0].0.as_str(), rows[0].1.as_str()), ("3", "reply"));
    assert_eq!((rows[1].0.as_str(), rows[1].1.as_str(), &rows[1].2["detail"]["why"]), ("4", "cancel", &json!("x\ny")));
    // What was done is undone, and then it has ended.
    happen(&lab, id, undone()).await;
    let mut last = stream.next().await.expect("a row");
    let mut seq = 4;
    while last.1 != "end" {
        seq += 1;
        assert_eq!(last.0, seq.to_string(), "dense");
        last = stream.next().await.expect("an end");
    }
    assert_eq!((last.0.as_str(), &last.2), ("", &json!({"reason": "final", "seq": seq, "saga_status": "compensated"})));
    assert_eq!(stream.next().await, None, "nothing after the end");

    // From a place within, and behind everything.
    let mut stream = Stream::open(&api, &format!("{events}?after=3"), &[]).await;
    assert_eq!(stream.next().await.expect("a row").0, "4");
    let mut stream = Stream::open(&api, &events, &[("last-event-id", "99")]).await;
    assert_eq!(stream.next().await.expect("an end").1, "end");
    for wrong in ["x", "-1", "1.5"] {
        let token = format!("Bearer {READ}");
        let headers = [("authorization", token.as_str()), ("last-event-id", wrong)];
        api.send("GET", &events, &headers, "").await.problem(400, "malformed");
    }
}

/// The reply to the undo of the first step.
fn undone() -> Event {
    use oncebox::saga::state::Op;
    let step = "reserve".to_owned();
    Event::Reply { step, op: Op::Undo, epoch: 1, outcome: Outcome::Succeeded, output: None, error: None }
}

/// Goal: a stream ends when its time is over and when the server does, and says which; while nothing happens a comment
/// shows that it lives; those beyond the bound are refused.
#[tokio::test]
async fn streams_are_bounded() {
    let lab = Lab::shared().await;
    let mut api = Api::start(&lab).await;
    define(&api).await;
    let (_, path) = started(&api, "o-1").await;
    let mut stream = Stream::open(&api, &format!("{path}/events?lasting=300ms&after=1"), &[]).await;
    let (_, event, data) = stream.next().await.expect("an end");
    assert_eq!((event.as_str(), data), ("end", json!({"reason": "time", "seq": 1, "saga_status": null})));
    api.get(&format!("{path}/events?lasting=x")).await.problem(400, "malformed");

    let mut quiet = Stream::open(&api, &format!("{path}/events?after=1"), &[]).await;
    let mut streams = Vec::new();
    for _ in 0..99 {
        streams.push(Stream::open(&api, &format!("{path}/events?after=1"), &[]).await);
    }
    api.get(&format!("{path}/events")).await.problem(503, "unavailable");
    streams.truncate(10);
    eventually("those that hung up make room", || async {
        let path = format!("{path}/events?lasting=1ms");
        (api.get(&path).await.status == 200).then_some(())
    })
    .await;
    // The heartbeat is the first thing of a stream on which nothing happens.
    let comment = quiet.until("\n\n").await.expect("a comment");
    assert!(comment.trim_end().ends_with(':'), "{comment:?}");
    api.process.signal("TERM");
    let (_, event, data) = quiet.next().await.expect("an end");
    assert_eq!((event.as_str(), &data["reason"]), ("end", &json!("shutdown")));
    let (status, took) = (api.process.end().await, Duration::from_secs(0));
    assert!(status.success() && took < Duration::from_secs(4), "{status}");
}
