//! Goal: sagas over HTTP: started once, shown as they are, acted on by who saw them as they are.

use crate::support::api::{Answer, Api, OPERATE, READ};
use crate::support::{Lab, eventually};
use oncebox::saga::state::{Event, Op, Operator, Outcome};
use oncebox::saga::store::{self, Definitions};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Two steps of which the first can be undone; a step that waits; a pivot.
pub fn order() -> Value {
    json!({"steps": [
        {"id": "reserve", "do": {"topic": "stock.reserve", "body": {"sku": "$.input.sku"}},
            "undo": {"topic": "stock.release", "body": {"id": "$.steps.reserve.output.id"}}},
        {"id": "approve", "wait": {"signal": "approved", "timeout": "24h"}},
        {"id": "charge", "pivot": true, "do": {"topic": "pay.charge", "body": {"order": "$.business_key"}}},
    ]})
}

/// A request with [`OPERATE`], a body of JSON unless it is null, and more headers.
pub async fn send(api: &Api, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    let token = format!("Bearer {OPERATE}");
    let mut all = vec![("authorization", token.as_str())];
    let text = if body.is_null() { String::new() } else { body.to_string() };
    if !body.is_null() && !headers.iter().any(|(name, _)| *name == "content-type") {
        all.push(("content-type", "application/json"));
    }
    all.extend_from_slice(headers);
    api.send(method, path, &all, &text).await
}

pub async fn define(api: &Api) {
    let answer = send(api, "PUT", "/v1/definitions/order/versions/1", &[], &order()).await;
    assert_eq!(answer.status, 201, "{answer:?}");
}

/// A saga with this key; its path.
pub async fn started(api: &Api, key: &str) -> (Uuid, String) {
    let body = json!({"definition": "order", "business_key": key, "input": {"sku": "a-1"}});
    let answer = api.post("/v1/sagas", &body).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    (answer.json()["id"].as_str().unwrap().parse().unwrap(), answer.header("location").to_owned())
}

/// One event, as the orchestrator would bring it.
pub async fn happen(lab: &Lab, id: Uuid, event: Event) {
    let acted = store::act(&mut lab.connect().await, &Definitions::default(), id, &event, None).await;
    acted.unwrap_or_else(|error| panic!("{event:?}: {error}"));
}

/// What a participant says of the first epoch of a step.
pub fn reply(step: &str, outcome: Outcome) -> Event {
    let output = (outcome == Outcome::Succeeded).then(|| json!({"id": 17}));
    Event::Reply { step: step.to_owned(), op: Op::Do, epoch: 1, outcome, output, error: None }
}

async fn act(api: &Api, path: &str, action: &str, tag: &str) -> Answer {
    let path = format!("{path}/actions/{action}");
    send(api, "POST", &path, &[("if-match", tag)], &json!({"reason": "the customer called"})).await
}

/// Goal: a request starts one saga, and repeated by its key the same; everything else about it is refused in words that
/// name the place.
#[tokio::test]
async fn sagas_are_started_once() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let body = json!({"definition": "order", "business_key": "o-1", "input": {"sku": "a-1"}, "deadline": "10m",
        "start_at": "2026-01-15T10:00:00+01:00", "labels": {"customer": "17"}});
    let key = [("idempotency-key", "k-1")];
    let first = send(&api, "POST", "/v1/sagas", &key, &body).await;
    assert_eq!(first.status, 201, "{first:?}");
    let saga = first.json();
    let id = saga["id"].as_str().unwrap();
    assert_eq!((first.header("location"), first.header("etag")), (&*format!("/v1/sagas/{id}"), "\"1\""));
    assert_eq!((&saga["status"], &saga["version"], &saga["seq"]), (&json!("scheduled"), &json!(1), &json!(1)));
    assert_eq!(saga["start_at"], "2026-01-15T09:00:00.000000Z");
    assert_eq!(saga["deadline"], "2026-01-15T09:10:00.000000Z");
    assert_eq!((&saga["input"], &saga["labels"]), (&body["input"], &body["labels"]));
    assert_eq!(saga["steps"].as_array().unwrap().len(), 3);
    assert_eq!(saga["allowed_actions"], json!(["cancel", "pause"]));

    // The same in another order of fields, and with what is left out said.
    let text = r#"{"labels": {"customer": "17"}, "deadline": "600s", "input": {"sku":"a-1"}, "version": null,
        "start_at": "2026-01-15T09:00:00Z", "business_key": "o-1", "definition": "order"}"#;
    let headers =
        [("idempotency-key", "k-1"), ("authorization", "Bearer operate-token"), ("content-type", "application/json")];
    let again = api.send("POST", "/v1/sagas", &headers, text).await;
    assert_eq!((again.status, again.json(), again.header("location")), (200, saga.clone(), first.header("location")));
    let mut other = body.clone();
    other["input"]["sku"] = json!("b-2");
    send(&api, "POST", "/v1/sagas", &key, &other).await.problem(422, "invalid");
    // Taken: by the same saga and by another one, with another name of the request or none.
    for (headers, body) in [(&[][..], &body), (&[("idempotency-key", "k-2")][..], &body), (&[][..], &other)] {
        let problem = send(&api, "POST", "/v1/sagas", headers, body).await.problem(409, "conflict");
        assert_eq!((&problem["saga_id"], &problem["saga_status"]), (&json!(id), &json!("scheduled")), "{problem}");
        assert_eq!((&problem["seq"], &problem["status"]), (&json!(1), &json!(409)), "{problem}");
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga_request").await, 1, "what was refused has no key");

    let with = |field: &str, value: Value| {
        let mut body = json!({"definition": "order", "business_key": "o-2"});
        body[field] = value;
        body
    };
    for (body, pointer) in [
        (with("definition", json!("none")), "/definition"),
        (with("version", json!(9)), "/version"),
        (with("version", json!("1")), "/version"),
        (with("business_key", json!("")), "/business_key"),
        (with("business_key", json!("a\0b")), "/business_key"),
        (with("business_key", json!("ä".repeat(128))), "/business_key"),
        (with("start_at", json!("tomorrow")), "/start_at"),
        (with("start_at", json!("1800-01-01T00:00:00Z")), "/start_at"),
        (with("deadline", json!(600)), "/deadline"),
        (with("deadline", json!("0s")), "/deadline"),
        (with("deadline", json!("3651d")), "/deadline"),
        (with("deadline", json!("99999999999d")), "/deadline"),
        (with("labels", json!({"a": 1})), "/labels/a"),
        (with("labels", json!([])), "/labels"),
        (with("input", json!({"a": "\0"})), "/input"),
        (with("imput", json!({})), "/imput"),
        (json!({"definition": "order"}), ""),
        (json!([]), ""),
    ] {
        let problem = api.post("/v1/sagas", &body).await.problem(422, "invalid");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}: {problem}");
    }
    let digits = r#"{"definition": "order", "business_key": "o-2", "input": {"n": 12345678901234567890123}}"#;
    let problem = api.post_text("/v1/sagas", digits).await.problem(422, "invalid");
    assert_eq!(problem["errors"][0]["pointer"], "/input", "{problem}");
    for key in ["", "k".repeat(256).as_str(), "ä"] {
        send(&api, "POST", "/v1/sagas", &[("idempotency-key", key)], &body).await.problem(400, "malformed");
    }
    api.post_text("/v1/sagas", "{").await.problem(400, "malformed");
    let answer = api.send("POST", "/v1/sagas", &[("authorization", "Bearer read-token")], "").await;
    answer.problem(403, "forbidden");
    assert_eq!(lab.number("select count(*) from oncebox.saga").await, 1);
}

/// Goal: twins of one request that come at once start one saga, and so do those of one business key.
#[tokio::test]
async fn twins_start_one_saga() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let statuses = |key: bool, business_key: &'static str| {
        let api = &api;
        async move {
            let body = json!({"definition": "order", "business_key": business_key});
            let headers = if key { &[("idempotency-key", business_key)][..] } else { &[] };
            let twins = (0..6).map(|_| send(api, "POST", "/v1/sagas", headers, &body));
            let mut answers = futures_util::future::join_all(twins).await;
            answers.sort_by_key(|answer| answer.status);
            answers
        }
    };
    for business_key in ["a", "b", "c"] {
        let twins = statuses(true, business_key).await;
        let found: Vec<u16> = twins.iter().map(|answer| answer.status).collect();
        assert_eq!(found, [200, 200, 200, 200, 200, 201], "{twins:?}");
        assert!(twins.iter().all(|answer| answer.json()["id"] == twins[0].json()["id"]), "{twins:?}");
    }
    let twins = statuses(false, "d").await;
    let found: Vec<u16> = twins.iter().map(|answer| answer.status).collect();
    assert_eq!(found, [201, 409, 409, 409, 409, 409], "{twins:?}");
    assert_eq!(lab.number("select count(*) from oncebox.saga").await, 4);
    assert_eq!(lab.number("select count(*) from oncebox.saga_request").await, 3);
}

/// Goal: a request whose client hangs up is done whole or not at all, and its name finds what it did.
#[tokio::test]
async fn a_client_that_hangs_up_leaves_nothing_half_done() {
    use tokio::io::AsyncWriteExt;
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let body = |n: usize| json!({"definition": "order", "business_key": format!("o-{n}")});
    for n in 0..20 {
        let (key, text) = (format!("k-{n}"), body(n).to_string());
        let headers = [
            ("authorization", "Bearer operate-token"),
            ("content-type", "application/json"),
            ("idempotency-key", key.as_str()),
        ];
        let request = crate::support::api::request(&api.address, "POST", "/v1/sagas", &headers, &text);
        let mut stream = tokio::net::TcpStream::connect(&api.address).await.expect("it listens");
        stream.write_all(&request).await.expect("it reads");
        tokio::time::sleep(Duration::from_millis(n as u64 % 7)).await;
    }
    for n in 0..20 {
        let again = send(&api, "POST", "/v1/sagas", &[("idempotency-key", &format!("k-{n}"))], &body(n)).await;
        assert!([200, 201].contains(&again.status), "{again:?}");
    }
    assert_eq!(lab.number("select count(*) from oncebox.saga").await, 20);
    assert_eq!(lab.number("select count(*) from oncebox.saga_request").await, 20);
    let open = "select count(*) from pg_stat_activity
        where application_name = 'oncebox serve' and state like 'idle in%' and datname = current_database()";
    eventually("no session idles in a transaction", || async { (lab.number(open).await == 0).then_some(()) }).await;
}

/// Goal: the list is cut by filters and pages, the newest first, and every page's link leads on.
#[tokio::test]
async fn sagas_are_listed_by_filters() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let answer = send(&api, "PUT", "/v1/definitions/other/versions/1", &[], &order()).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    for n in 0..7 {
        let definition = if n == 6 { "other" } else { "order" };
        let body = json!({"definition": definition, "business_key": format!("o-{}", n % 6),
            "labels": {"n": n.to_string(), "odd": (n % 2 == 1).to_string()}});
        assert_eq!(api.post("/v1/sagas", &body).await.status, 201);
    }
    let (id, _) = started(&api, "cancelled").await;
    happen(&lab, id, Event::Cancel(Operator { who: "me".into(), why: "x".into() })).await;
    lab.sql("select oncebox.saga_open('enlisted')").await;
    let keys = |query: &'static str| {
        let api = &api;
        async move {
            let (mut found, mut pages, mut next) = (Vec::new(), 0, format!("/v1/sagas?{query}"));
            loop {
                let answer = api.get(&next).await;
                assert_eq!(answer.status, 200, "{next}: {answer:?}");
                pages += 1;
                for saga in answer.json()["items"].as_array().unwrap() {
                    assert!(saga.get("input").is_none() && saga["seq"].is_number(), "{saga}");
                    found.push(saga["business_key"].as_str().unwrap().to_owned());
                }
                let Some(link) = answer.headers.get("link") else { return (found.join(" "), pages) };
                next = link.trim_start_matches('<').split('>').next().unwrap().to_owned();
                assert!(pages < 20, "the links go round");
            }
        }
    };
    assert_eq!(keys("limit=4").await, ("enlisted cancelled o-0 o-5 o-4 o-3 o-2 o-1 o-0".to_owned(), 3));
    assert_eq!(keys("limit=2&status=scheduled&definition=order").await, ("o-5 o-4 o-3 o-2 o-1 o-0".to_owned(), 3));
    assert_eq!(keys("status=cancelled,running").await.0, "enlisted cancelled");
    assert_eq!(keys("business_key=o-0").await.0, "o-0 o-0");
    assert_eq!(keys("business_key=enlisted").await.0, "enlisted");
    assert_eq!(keys("business_key=o-0&definition=other").await.0, "o-0");
    assert_eq!(keys("label.odd=true").await.0, "o-5 o-3 o-1");
    assert_eq!(keys("label.odd=true&label.n=3").await.0, "o-3");
    assert_eq!(keys("label.odd=maybe").await.0, "");
    assert_eq!(keys("created_after=2020-01-01T00:00:00Z&status=cancelled").await.0, "cancelled");
    assert_eq!(keys("created_after=2999-01-01T00:00:00%2B02:00").await.0, "");
    let made =
        api.get("/v1/sagas?business_key=o-5").await.json()["items"][0]["created_at"].as_str().unwrap().to_owned();
    let answer = api.get(&format!("/v1/sagas?created_after={made}&business_key=o-5")).await;
    assert_eq!(answer.json()["items"], json!([]), "after, not at");
    for wrong in [
        "status=done",
        "status=running,",
        "limit=0",
        "limit=201",
        "cursor=zz",
        "created_after=now",
        "label.=x",
        "label.a=1&label.a=2",
        "order=id",
    ] {
        let problem = api.get(&format!("/v1/sagas?{wrong}")).await.problem(400, "malformed");
        let name = wrong.split('=').next().unwrap();
        assert_eq!(problem["errors"][0]["parameter"], name, "{problem}");
    }
}

/// Goal: a saga is shown with its parts, by its tag only when it has changed, and one that is gone is told from one that
/// never was.
#[tokio::test]
async fn sagas_are_shown() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    happen(&lab, id, Event::Due {}).await;
    let digits = json!({"id": 17, "price": 0.1, "big": 9007199254740993_i64});
    let reply = Event::Reply {
        step: "reserve".into(),
        op: Op::Do,
        epoch: 1,
        outcome: Outcome::Succeeded,
        output: Some(digits.clone()),
        error: None,
    };
    happen(&lab, id, reply).await;
    let answer = api.get(&path).await;
    let saga = answer.json();
    assert_eq!((answer.header("etag"), &saga["seq"], &saga["status"]), ("\"3\"", &json!(3), &json!("running")));
    assert_eq!(saga["steps"][0]["output"], digits);
    assert_eq!((&saga["steps"][0]["status"], &saga["steps"][1]["status"]), (&json!("succeeded"), &json!("dispatched")));
    let with = |tag: &'static str| {
        let (api, path) = (&api, &path);
        async move { send(api, "GET", path, &[("if-none-match", tag)], &Value::Null).await }
    };
    let unchanged = with("\"3\"").await;
    assert_eq!((unchanged.status, unchanged.header("etag"), unchanged.body.as_str()), (304, "\"3\"", ""));
    assert_eq!(with("W/\"3\"").await.status, 304);
    assert_eq!(with("\"2\"").await.status, 200);
    with("3").await.problem(400, "malformed");

    let steps = api.get(&format!("{path}/steps")).await.json();
    assert_eq!(steps["items"], saga["steps"]);
    let compensations = api.get(&format!("{path}/compensations")).await.json();
    assert_eq!(compensations["items"][0]["payload"], json!({"id": 17}), "{compensations}");
    assert_eq!(compensations["items"][0]["topic"], "stock.release");
    let history = api.get(&format!("{path}/history?limit=2")).await;
    let rows = history.json();
    let events: Vec<_> = rows["items"].as_array().unwrap().iter().map(|row| row["event"].as_str().unwrap()).collect();
    assert_eq!((events, history.headers.contains_key("link")), (vec!["created", "due"], true));
    let after = api.get(&format!("{path}/history?after=2")).await.json();
    assert_eq!((&after["items"][0]["seq"], &after["items"][0]["event"]), (&json!(3), &json!("reply")));
    assert_eq!(after["items"].as_array().unwrap().len(), 1);
    api.get(&format!("{path}/history?after=-1")).await.problem(400, "malformed");

    let graph = api.get(&format!("{path}/graph")).await.json();
    assert_eq!(graph["edges"], json!([{"from": "reserve", "to": "approve"}, {"from": "approve", "to": "charge"}]));
    assert_eq!((&graph["nodes"][1]["kind"], &graph["nodes"][1]["signal"]), (&json!("wait"), &json!("approved")));
    let dot = send(&api, "GET", &format!("{path}/graph"), &[("accept", "text/vnd.graphviz")], &Value::Null).await;
    assert_eq!(dot.header("content-type"), "text/vnd.graphviz");
    assert!(dot.body.contains("\"approve\" -> \"charge\";"), "{}", dot.body);

    let verified = api.get(&format!("{path}/verify")).await.json();
    assert_eq!((&verified["is_clean"], &verified["rows"]), (&json!(true), &json!(3)), "{verified}");
    assert_eq!((&verified["commands"], &verified["findings"]), (&json!(1), &json!([])), "{verified}");

    let gone = Uuid::now_v7();
    lab.sql(&format!(
        "insert into oncebox.saga_purged (id, status, ended_at) values ('{gone}', 'completed', '2026-01-15Z')"
    ))
    .await;
    for part in ["", "/steps", "/compensations", "/history", "/graph", "/verify", "/events"] {
        api.get(&format!("/v1/sagas/{}{part}", Uuid::now_v7())).await.problem(404, "not-found");
        let problem = api.get(&format!("/v1/sagas/{gone}{part}")).await.problem(410, "gone");
        assert_eq!(problem["saga_id"], gone.to_string(), "{problem}");
        assert_eq!(problem["ended_at"], "2026-01-15T00:00:00.000000Z", "{problem}");
        api.get(&format!("/v1/sagas/none{part}")).await.problem(400, "malformed");
        api.get(&format!("{path}{part}?x=1")).await.problem(400, "malformed");
    }
    for action in ["actions/cancel", "steps/reserve/actions/retry", "signals/approved"] {
        let body = if action.starts_with("signals") { json!({}) } else { json!({"reason": "x"}) };
        let to = |id: Uuid| format!("/v1/sagas/{id}/{action}");
        send(&api, "POST", &to(gone), &[("if-match", "*")], &body).await.problem(410, "gone");
        send(&api, "POST", &to(Uuid::now_v7()), &[("if-match", "*")], &body).await.problem(404, "not-found");
    }
    // One that was opened without a definition is a chain.
    lab.sql("select oncebox.saga_open('o-2')").await;
    let opened = api.get("/v1/sagas?business_key=o-2").await.json()["items"][0]["id"].as_str().unwrap().to_owned();
    let opened = api.get(&format!("/v1/sagas/{opened}")).await.json();
    assert_eq!((&opened["definition"], &opened["status"]), (&Value::Null, &json!("running")));
}

/// Goal: an action needs the tag that was read and a reason, happens once, is recorded with who and why, and what is
/// illegal now says what is legal.
#[tokio::test]
async fn actions_are_guarded() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    let bare = send(&api, "POST", &format!("{path}/actions/terminate"), &[], &json!({"reason": "x"})).await;
    bare.problem(428, "precondition-required");
    let problem = act(&api, &path, "pause", "\"9\"").await.problem(412, "stale");
    assert_eq!((&problem["seq"], &problem["saga_status"]), (&json!(1), &json!("scheduled")), "{problem}");
    act(&api, &path, "pause", "1").await.problem(400, "malformed");
    act(&api, &path, "explode", "*").await.problem(404, "not-found");
    for (reason, pointer) in [(json!(""), "/reason"), (json!("x".repeat(1001)), "/reason"), (json!(5), "/reason")] {
        let to = format!("{path}/actions/pause");
        let problem =
            send(&api, "POST", &to, &[("if-match", "*")], &json!({"reason": reason})).await.problem(422, "invalid");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let paused = act(&api, &path, "pause", "\"7\", \"1\"").await;
    assert_eq!((paused.status, paused.header("etag"), &paused.json()["paused"]), (202, "\"2\"", &json!(true)));
    let problem = act(&api, &path, "pause", "*").await.problem(409, "conflict");
    assert_eq!(problem["allowed_actions"], json!(["cancel", "resume"]), "{problem}");
    assert_eq!((&problem["saga_id"], &problem["seq"]), (&json!(id), &json!(2)), "{problem}");
    assert_eq!(act(&api, &path, "resume", "\"2\"").await.status, 202);
    act(&api, &path, "retry", "*").await.problem(409, "conflict");
    act(&api, &path, "terminate", "\"1\"").await.problem(412, "stale");
    let history = api.get(&format!("{path}/history?after=1")).await.json();
    assert_eq!(history["items"][0]["event"], "pause");
    assert_eq!(history["items"][0]["detail"], json!({"who": "ONCEBOX_API_TOKEN", "why": "the customer called"}));

    // Two at once: one finds that the saga has moved on.
    let (one, two) = tokio::join!(act(&api, &path, "cancel", "\"3\""), act(&api, &path, "cancel", "\"3\""));
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [202, 412], "{one:?} {two:?}");
    assert_eq!(api.get(&path).await.json()["status"], "cancelled");
    let problem = act(&api, &path, "cancel", "*").await.problem(409, "conflict");
    assert_eq!((&problem["allowed_actions"], &problem["saga_status"]), (&json!([]), &json!("cancelled")), "{problem}");
    let rows = "select count(*) from oncebox.saga_history where event = 'cancel'";
    assert_eq!(lab.number(rows).await, 1);
    api.ask("POST", &format!("{path}/actions/cancel"), READ).await.problem(403, "forbidden");
}

/// Goal: a stuck step is retried, skipped or resolved by hand; what a step cannot do now says what it can.
#[tokio::test]
async fn steps_are_acted_on() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let one = json!({"steps": [
        {"id": "charge", "pivot": true, "retry": {"max": 1}, "do": {"topic": "pay.charge", "body": {}}},
        {"id": "mail", "do": {"topic": "mail.send", "body": {"of": "$.steps.charge.output.id"}}},
    ]});
    let answer = send(&api, "PUT", "/v1/definitions/order/versions/1", &[], &one).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let step = |path: &str, step: &str, action: &str| format!("{path}/steps/{step}/actions/{action}");
    let star = [("if-match", "*")];
    let because = json!({"reason": "looked"});
    let mut stuck = Vec::new();
    for key in ["a", "b", "c"] {
        let (id, path) = started(&api, key).await;
        happen(&lab, id, Event::Due {}).await;
        happen(&lab, id, reply("charge", Outcome::Retry)).await;
        let saga = api.get(&path).await.json();
        assert_eq!((&saga["status"], &saga["steps"][0]["status"]), (&json!("stuck"), &json!("unknown")), "{saga}");
        assert_eq!(saga["steps"][0]["allowed_actions"], json!(["retry", "resolve"]), "{saga}");
        assert_eq!(saga["allowed_actions"], json!(["pause", "retry", "terminate"]), "{saga}");
        stuck.push((id, path));
    }
    let (_, path) = &stuck[0];
    let bare = send(&api, "POST", &step(path, "charge", "retry"), &[], &because).await;
    bare.problem(428, "precondition-required");
    send(&api, "POST", &step(path, "charge", "resolve"), &[], &because).await.problem(428, "precondition-required");
    let problem = send(&api, "POST", &step(path, "charge", "skip"), &star, &because).await.problem(409, "conflict");
    assert_eq!(problem["allowed_actions"], json!(["retry", "resolve"]), "{problem}");
    send(&api, "POST", &step(path, "none", "skip"), &star, &because).await.problem(404, "not-found");
    send(&api, "POST", &step(path, "charge", "explode"), &star, &because).await.problem(404, "not-found");
    let retried = send(&api, "POST", &step(path, "charge", "retry"), &star, &because).await;
    assert_eq!((retried.status, &retried.json()["status"]), (202, &json!("running")), "{retried:?}");

    let (_, path) = &stuck[1];
    for (body, pointer) in [
        (json!({"reason": "x", "outcome": "maybe"}), "/outcome"),
        (json!({"reason": "x"}), ""),
        (json!({"outcome": "succeeded"}), ""),
        (json!({"reason": "x", "outcome": "succeeded", "outputs": 1}), "/outputs"),
    ] {
        let problem = send(&api, "POST", &step(path, "charge", "resolve"), &star, &body).await.problem(422, "invalid");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let body = json!({"reason": "seen in the books", "outcome": "succeeded", "output": {"id": 5}});
    let resolved = send(&api, "POST", &step(path, "charge", "resolve"), &star, &body).await;
    assert_eq!(resolved.status, 202, "{resolved:?}");
    let saga = resolved.json();
    assert_eq!((&saga["steps"][0]["status"], &saga["steps"][0]["output"]), (&json!("succeeded"), &json!({"id": 5})));

    let (_, path) = &stuck[2];
    let terminated = act(&api, path, "terminate", "*").await;
    assert_eq!((terminated.status, &terminated.json()["status"]), (202, &json!("terminated")), "{terminated:?}");
    assert!(terminated.json()["ended_at"].is_string());
}

/// Goal: cancel and the reply that completes the pivot race: whoever is second is answered by what the first made of
/// the saga, and what came of it is one or the other.
#[tokio::test]
async fn cancel_races_the_last_reply() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let one = json!({"steps": [{"id": "charge", "pivot": true, "do": {"topic": "pay.charge", "body": {}}}]});
    assert_eq!(send(&api, "PUT", "/v1/definitions/order/versions/1", &[], &one).await.status, 201);
    let mut first = [0, 0];
    for n in 0..12 {
        let (id, path) = started(&api, &n.to_string()).await;
        happen(&lab, id, Event::Due {}).await;
        let tag = api.get(&path).await.header("etag").to_owned();
        let mut conn = lab.connect().await;
        let last = async {
            tokio::time::sleep(Duration::from_millis(n % 6 * 2)).await;
            happen_on(&mut conn, id, reply("charge", Outcome::Succeeded)).await
        };
        let (cancelled, ()) = tokio::join!(act(&api, &path, "cancel", &tag), last);
        // The reply counts in either order: a cancel waits for the pivot, and a pivot that is done has no way back.
        let saga = api.get(&path).await.json();
        assert_eq!(
            (&saga["status"], &saga["steps"][0]["status"]),
            (&json!("completed"), &json!("succeeded")),
            "{saga}"
        );
        let rows = format!("select count(*) from oncebox.saga_history where saga_id = '{id}' and event = 'cancel'");
        let cancels = lab.number(&rows).await;
        match cancelled.status {
            202 => assert_eq!((cancels, &cancelled.json()["cancel"]), (1, &json!("the customer called"))),
            412 => assert_eq!(cancels, 0),
            _ => panic!("{cancelled:?}"),
        }
        first[usize::from(cancelled.status == 412)] += 1;
        act(&api, &path, "cancel", "*").await.problem(409, "conflict");
    }
    println!("cancel first {}, reply first {}", first[0], first[1]);
}

async fn happen_on(conn: &mut sqlx::PgConnection, id: Uuid, event: Event) {
    let acted = store::act(conn, &Definitions::default(), id, &event, None).await;
    acted.unwrap_or_else(|error| panic!("{event:?}: {error}"));
}

/// Goal: a signal is taken once, and one that nobody waits for, or that comes after the end, is refused in clear words.
#[tokio::test]
async fn signals_are_sent() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    let signal = |name: &str, body: Value| {
        let path = format!("{path}/signals/{name}");
        let api = &api;
        async move { api.post(&path, &body).await }
    };
    for _ in 0..2 {
        let sent = signal("approved", json!({"payload": {"by": "anna"}})).await;
        assert_eq!(sent.status, 202, "{sent:?}");
        let saga = sent.json();
        assert_eq!(
            (&saga["signals"][0]["payload"], &saga["signals"][0]["state"]),
            (&json!({"by": "anna"}), &json!("new"))
        );
        assert_eq!(saga["signals"].as_array().unwrap().len(), 1);
    }
    let problem = signal("approved", json!({"payload": 5})).await.problem(409, "conflict");
    assert!(problem["detail"].as_str().unwrap().contains("with another payload"), "{problem}");
    let problem = signal("none", json!({})).await.problem(422, "invalid");
    assert!(
        problem["detail"].as_str().unwrap().contains("no step of definition \"order\" version 1 waits"),
        "{problem}"
    );
    let problem = signal("approved", json!({"payload": "\0"})).await.problem(422, "invalid");
    assert_eq!(problem["errors"][0]["pointer"], "/payload", "{problem}");
    let problem = signal("approved", json!({"pay": 1})).await.problem(422, "invalid");
    assert_eq!(problem["errors"][0]["pointer"], "/pay", "{problem}");
    let (other, other_path) = started(&api, "o-2").await;
    happen(&lab, other, Event::Cancel(Operator { who: "me".into(), why: "x".into() })).await;
    let problem = api.post(&format!("{other_path}/signals/approved"), &json!({})).await.problem(409, "conflict");
    assert_eq!((&problem["saga_status"], &problem["saga_id"]), (&json!("cancelled"), &json!(other)), "{problem}");
    happen(&lab, id, Event::Cancel(Operator { who: "me".into(), why: "x".into() })).await;
    assert_eq!(signal("approved", json!({"payload": {"by": "anna"}})).await.status, 202, "the same again");
}

/// Goal: definitions are put once, as JSON or YAML, shown as they were put, and removed only while nothing follows them.
#[tokio::test]
async fn definitions_are_put_once() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let path = "/v1/definitions/order/versions/1";
    let put = |path: &'static str, headers: &'static [(&str, &str)], body: Value| {
        let api = &api;
        async move { send(api, "PUT", path, headers, &body).await }
    };
    api.get("/v1/definitions/order").await.problem(404, "not-found");
    api.get(path).await.problem(404, "not-found");
    let new = put(path, &[("if-none-match", "*")], order()).await;
    assert_eq!((new.status, new.header("location")), (201, path), "{new:?}");
    let mut document = order();
    document["name"] = json!("order");
    document["version"] = json!(1);
    assert_eq!(new.json(), document);
    let same = put(path, &[], document.clone()).await;
    assert_eq!((same.status, same.json(), same.header("etag")), (200, document.clone(), new.header("etag")));
    put(path, &[("if-none-match", "*")], document.clone()).await.problem(412, "stale");
    let mut other = order();
    other["deadline"] = json!("1h");
    put(path, &[], other.clone()).await.problem(409, "conflict");
    assert_eq!(put("/v1/definitions/order/versions/2", &[], other).await.status, 201);
    let yaml = "steps:\n- id: a\n  do: {topic: x.y, body: {n: 1}}\n";
    let headers = [("authorization", "Bearer operate-token"), ("content-type", "application/yaml")];
    let answer = api.send("PUT", "/v1/definitions/yaml/versions/7", &headers, yaml).await;
    assert_eq!((answer.status, &answer.json()["steps"][0]["do"]["body"]), (201, &json!({"n": 1})), "{answer:?}");
    assert_eq!(api.send("PUT", "/v1/definitions/validate/versions/1", &headers, yaml).await.status, 201);
    assert_eq!(api.get("/v1/definitions/validate/versions/1").await.json()["name"], "validate");
    assert_eq!(api.get("/v1/definitions/validate").await.status, 405, "found in the list alone");

    let shown = api.get(path).await;
    assert_eq!((shown.json(), shown.header("etag")), (document.clone(), new.header("etag")));
    let tag = shown.header("etag").to_owned();
    assert_eq!(send(&api, "GET", path, &[("if-none-match", &tag)], &Value::Null).await.status, 304);
    let named = api.get("/v1/definitions/order").await.json();
    let versions: Vec<_> =
        named["versions"].as_array().unwrap().iter().map(|v| v["version"].as_i64().unwrap()).collect();
    assert_eq!((versions, &named["versions"][0]["created_by"]), (vec![2, 1], &json!("ONCEBOX_API_TOKEN")));
    let page = api.get("/v1/definitions?limit=2").await;
    let names: Vec<_> = page.json()["items"].as_array().unwrap().iter().map(|d| d["name"].clone()).collect();
    assert_eq!((names, page.headers.contains_key("link")), (vec![json!("order"), json!("validate")], true));

    for (body, pointer) in [
        (json!({"name": "other", "steps": order()["steps"]}), "/name"),
        (json!({"version": 2, "steps": order()["steps"]}), "/version"),
        (json!({"steps": [{"id": "a", "do": {"topic": "x", "body": {}}, "tmeout": "1s"}]}), "/steps/0/tmeout"),
        (json!({"steps": [{"id": "a", "do": {"topic": "x", "body": "$.steps.b.output"}}]}), "/steps/0/do/body"),
        (json!({"steps": 5}), "/steps"),
    ] {
        let problem = put("/v1/definitions/order/versions/3", &[], body.clone()).await.problem(422, "invalid");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}: {problem}");
    }
    for version in ["0", "x", "-1", "99999999999"] {
        let to = format!("/v1/definitions/order/versions/{version}");
        send(&api, "PUT", &to, &[], &order()).await.problem(404, "not-found");
    }
    let headers = [("authorization", "Bearer operate-token"), ("content-type", "text/plain")];
    api.send("PUT", path, &headers, yaml).await.problem(415, "unsupported-media-type");
    put(path, &[("if-none-match", "\"x\"")], order()).await.problem(400, "malformed");

    let valid = api.post("/v1/definitions/validate", &document).await;
    assert_eq!(
        valid.json(),
        json!({"valid": true, "name": "order", "version": 1, "steps": ["reserve", "approve", "charge"]})
    );
    let two = json!({"name": "x", "version": 1, "steps": [
        {"id": "a", "after": ["b"], "do": {"topic": "x", "body": {}}}, {"id": "b", "after": ["a"], "undo": {}}]});
    let problem = api.post("/v1/definitions/validate", &two).await.problem(422, "invalid");
    assert!(problem["errors"].as_array().unwrap().len() > 1, "{problem}");

    started(&api, "o-1").await;
    let delete = |path: &'static str| send(&api, "DELETE", path, &[], &Value::Null);
    let problem = delete("/v1/definitions/order/versions/2").await.problem(409, "conflict");
    assert!(problem["detail"].as_str().unwrap().contains("in use by 1 saga"), "{problem}");
    let gone = send(&api, "DELETE", path, &[], &Value::Null).await;
    assert_eq!((gone.status, gone.body.as_str()), (204, ""), "{gone:?}");
    delete("/v1/definitions/order/versions/1").await.problem(404, "not-found");
    assert_eq!(lab.number("select count(*) from oncebox.saga_definition").await, 3);
}

/// Goal: a long poll answers as soon as the saga changes, at its end otherwise, and at the server's end; those beyond the
/// bound are refused; one that hung up makes room.
#[tokio::test]
async fn long_polls_wake_up() {
    let lab = Lab::shared().await;
    let mut api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    let wait = |tag: &'static str, wait: &'static str| {
        let (api, path) = (&api, format!("{path}?wait={wait}"));
        async move { send(api, "GET", &path, &[("if-none-match", tag)], &Value::Null).await }
    };
    let began = Instant::now();
    let over = wait("\"1\"", "300ms").await;
    assert_eq!((over.status, over.header("etag")), (304, "\"1\""));
    assert!(began.elapsed() >= Duration::from_millis(300));
    let began = Instant::now();
    assert_eq!(wait("\"0\"", "60s").await.status, 200);
    assert_eq!(api.get(&format!("{path}?wait=60s")).await.status, 200, "nothing is known: nothing to wait for");
    assert!(began.elapsed() < Duration::from_secs(30));
    let change = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        happen(&lab, id, Event::Due {}).await;
    };
    let (changed, ()) = tokio::join!(wait("\"1\"", "60s"), change);
    assert_eq!((changed.status, changed.header("etag")), (200, "\"2\""));
    assert!(began.elapsed() < Duration::from_secs(50), "it woke up");
    for wrong in ["61s", "1", "", "-1s"] {
        api.get(&format!("{path}?wait={wrong}")).await.problem(400, "malformed");
    }

    // More than may: some of them are told that no session is free.
    let headers = [("authorization", "Bearer read-token"), ("if-none-match", "\"2\"")];
    let request = crate::support::api::request(&api.address, "GET", &format!("{path}?wait=60s"), &headers, "");
    let mut waiting = Vec::new();
    for _ in 0..150 {
        let mut stream = tokio::net::TcpStream::connect(&api.address).await.expect("it listens");
        tokio::io::AsyncWriteExt::write_all(&mut stream, &request).await.expect("it reads");
        waiting.push(stream);
    }
    let refused = eventually("one is refused", || async {
        let answer = wait("\"2\"", "10ms").await;
        (answer.status != 304).then_some(answer)
    })
    .await;
    refused.problem(503, "unavailable");
    assert_eq!(refused.header("retry-after"), "1");
    waiting.truncate(50);
    eventually("those that hung up make room", || async { (wait("\"2\"", "10ms").await.status == 304).then_some(()) })
        .await;

    let last = tokio::spawn({
        let (address, request) = (api.address.clone(), request.clone());
        async move { crate::support::api::raw(&address, &request).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (status, took) = api.process.stop().await;
    assert!(status.success() && took < Duration::from_secs(4), "{status} {took:?}");
    assert_eq!(last.await.expect("an answer").status, 304);
}

/// Goal: a request that was refused leaves no lock behind, on the saga or on the request's name, that others wait for.
#[tokio::test]
async fn refusals_hold_up_nobody() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (id, path) = started(&api, "o-1").await;
    act(&api, &path, "cancel", "\"77\"").await.problem(412, "stale");
    act(&api, &path, "resume", "*").await.problem(409, "conflict");
    let free = "select count(*) from (select from oncebox.saga where id = $1 for no key update skip locked) as free";
    let free: i64 = sqlx::query_scalar(free).bind(id).fetch_one(&mut lab.connect().await).await.expect("a count");
    assert_eq!(free, 1, "the saga is still locked");

    let key = [("idempotency-key", "k-1")];
    let body = |key: &str| json!({"definition": "order", "business_key": key});
    assert_eq!(send(&api, "POST", "/v1/sagas", &key, &body("o-2")).await.status, 201);
    send(&api, "POST", "/v1/sagas", &key, &body("o-3")).await.problem(422, "invalid");
    let open = "select count(*) from pg_stat_activity where application_name = 'oncebox serve'
        and datname = current_database() and state like 'idle in transaction%'";
    assert_eq!(lab.number(open).await, 0, "a transaction is left open");
}

/// Goal: JSON that Postgres cannot hold is the client's to mend, and named.
#[tokio::test]
async fn json_that_cannot_be_held_is_refused() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    define(&api).await;
    let (_, path) = started(&api, "o-1").await;
    for text in ["\\u0000", "\\ud800", "\\udc00x"] {
        let signal = format!("{{\"payload\": \"{text}\"}}");
        let refused = api.post_text(&format!("{path}/signals/approved"), &signal).await.problem(422, "invalid");
        assert_eq!(refused["errors"][0]["pointer"], "/payload", "{refused}");
        let start = format!("{{\"definition\": \"order\", \"business_key\": \"o-2\", \"input\": [\"{text}\"]}}");
        let refused = api.post_text("/v1/sagas", &start).await.problem(422, "invalid");
        assert_eq!(refused["errors"][0]["pointer"], "/input", "{refused}");
    }
}
