//! Goal: the API shows and changes what the tables hold, lets nobody in without a token that reaches so far, and is what
//! its description says.

use crate::support::api::{Api, OPERATE, READ};
use crate::support::{Lab, ONCEBOX, eventually, eventually_number};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::process::Command;

/// Every operation: method, path as described, and its part of the description.
fn operations() -> Vec<(String, String, Value)> {
    let description: Value = serde_json::from_str(&oncebox::api::openapi_json()).expect("JSON");
    let mut found = Vec::new();
    for (path, item) in description["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            if ["get", "put", "post", "delete", "patch"].contains(&method.as_str()) {
                found.push((method.to_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    assert!(found.len() > 20, "only {} operations", found.len());
    found
}

/// The path with the examples of its parameters.
fn filled(path: &str, operation: &Value) -> String {
    let mut path = path.to_owned();
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        if parameter["in"] == "path" {
            let name = parameter["name"].as_str().expect("a name");
            let example = &parameter["example"];
            assert!(!example.is_null(), "{path}: {name} has no example");
            let value = example.as_str().map_or(example.to_string(), str::to_owned);
            path = path.replace(&format!("{{{name}}}"), &value);
        }
    }
    assert!(!path.contains('{'), "{path}");
    path
}

/// Goal: every operation has a name, a summary, examples of what goes in and what comes out, and a scheme or a place in
/// the list of open ones.
#[test]
fn the_description_is_whole() {
    let description: Value = serde_json::from_str(&oncebox::api::openapi_json()).expect("JSON");
    assert!(description["openapi"].as_str().expect("a version").starts_with("3.1."), "{}", description["openapi"]);
    assert_eq!(description["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    let mut names = HashSet::new();
    for (method, path, operation) in operations() {
        let what = format!("{method} {path}");
        assert!(
            names.insert(operation["operationId"].as_str().expect(&what).to_owned()),
            "{what}: operationId is taken"
        );
        assert!(operation["summary"].is_string(), "{what}: no summary");
        let is_open = ["/healthz", "/readyz", "/metrics", "/openapi.yaml"].contains(&path.as_str());
        let security = if is_open { json!([]) } else { json!([{"bearer": []}]) };
        assert_eq!(operation["security"], security, "{what}");
        let has_example = |content: &Value, what: &str| {
            for (kind, media) in content.as_object().into_iter().flatten() {
                assert!(!media["example"].is_null() || !media["examples"].is_null(), "{what} {kind}: no example");
            }
        };
        has_example(&operation["requestBody"]["content"], &what);
        let responses = operation["responses"].as_object().expect("responses");
        assert!(responses.keys().any(|status| status.starts_with('2')), "{what}");
        for (status, response) in responses {
            if status.starts_with('2') {
                has_example(&response["content"], &format!("{what} {status}"));
            }
        }
        let problems = if is_open { &["400", "414"][..] } else { &["400", "401", "403", "414", "500", "503"] };
        for status in problems {
            assert!(responses.contains_key(*status), "{what}: {status} is not described");
        }
        if !operation["requestBody"].is_null() {
            for status in ["413", "415", "422"] {
                assert!(responses.contains_key(status), "{what}: {status} is not described");
            }
        }
    }
}

/// Goal: no route below /v1 answers without a token, and none that changes anything does so for a token that may only
/// look: by the description's own list of routes.
#[tokio::test]
async fn every_route_asks_for_a_token() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    for (method, path, operation) in operations() {
        let path = filled(&path, &operation);
        let what = format!("{method} {path}");
        if !path.starts_with("/v1/") {
            let answer = api.send(&method, &path, &[], "").await;
            assert_eq!(answer.status, 200, "{what}: {answer:?}");
            continue;
        }
        let answer = api.send(&method, &path, &[], "").await;
        answer.problem(401, "unauthorized");
        assert_eq!(answer.header("www-authenticate"), "Bearer", "{what}");
        assert_eq!(answer.header("cache-control"), "no-store", "{what}");
        for wrong in ["", "Bearer", "Bearer ", "Bearer x", "bearer\toperate-token", "Basic operate-token", OPERATE] {
            let answer = api.send(&method, &path, &[("authorization", wrong)], "").await;
            answer.problem(401, "unauthorized");
        }
        let two = [("authorization", "Bearer operate-token"), ("authorization", "Bearer operate-token")];
        api.send(&method, &path, &two, "").await.problem(401, "unauthorized");
        let looking = api.ask(&method, &path, READ).await;
        match method.as_str() {
            "GET" => assert!(![401, 403].contains(&looking.status), "{what}: {looking:?}"),
            _ => {
                let problem = looking.problem(403, "forbidden");
                assert!(problem["detail"].as_str().unwrap().contains("\"eye\" has the scope read"), "{problem}");
            }
        }
        let operating = api.ask(&method, &path, OPERATE).await;
        assert!(![401, 403].contains(&operating.status), "{what}: {operating:?}");
    }
    for (method, path) in
        [("GET", "/v1"), ("GET", "/v1/"), ("GET", "/v1/nowhere"), ("PUT", "/v1/outbox"), ("OPTIONS", "/v1/outbox")]
    {
        api.send(method, path, &[], "").await.problem(401, "unauthorized");
    }
    api.ask("GET", "/v1/nowhere", READ).await.problem(404, "not-found");
    // No other spelling of a path reaches a route.
    for path in ["//v1/outbox", "/%761/outbox", "/V1/outbox", "/healthz/../v1/outbox", "/v1//outbox", "/./v1/outbox"] {
        let answer = api.send("GET", path, &[], "").await;
        assert!([401, 404].contains(&answer.status), "{path}: {answer:?}");
    }
    // The absolute form names a path too.
    let absolute = format!("http://{}/v1/outbox", api.address);
    api.send("GET", &absolute, &[], "").await.problem(401, "unauthorized");
}

/// Goal: tokens come from the environment and from a file; without any, the answer says how to make one; metrics close
/// when the config says so; what is wrong in the file is a line that names it.
#[tokio::test]
async fn tokens_are_made_and_read() {
    let lab = Lab::shared().await;
    let none = Api::spawn(lab.command(&["serve"])).await;
    let problem = none.ask("GET", "/v1/outbox", OPERATE).await.problem(401, "unauthorized");
    assert!(problem["detail"].as_str().unwrap().contains("ONCEBOX_API_TOKEN"), "{problem}");
    assert_eq!(none.send("GET", "/metrics", &[], "").await.status, 200);

    let made = Command::new(ONCEBOX).args(["token", "ops", "--scope", "operate"]).output().expect("it runs");
    assert!(made.status.success(), "{made:?}");
    let (line, said) = (String::from_utf8(made.stdout).unwrap(), String::from_utf8(made.stderr).unwrap());
    let token = said.lines().last().expect("the token").to_owned();
    assert!(line.starts_with("ops operate sha256:") && !line.contains(&token) && token.len() == 64, "{line}{said}");
    let again = Command::new(ONCEBOX).args(["token", "ops", "--scope", "operate"]).output().expect("it runs");
    assert_ne!(String::from_utf8(again.stdout).unwrap(), line, "the same token twice");
    let tokens = lab.config(&format!("# made by hand\n{line}"));
    let config = lab.config(&format!("[api]\ntokens = {tokens:?}\nmetrics = \"token\"\n"));
    let api = Api::spawn(lab.command(&["serve", "--config", &config])).await;
    assert_eq!(api.ask("GET", "/v1/outbox", &token).await.status, 200);
    let paused = api
        .send(
            "POST",
            "/v1/outbox/pauses",
            &[("authorization", &format!("Bearer {token}")), ("content-type", "application/json")],
            r#"{"topic": "a.b", "reason": "x"}"#,
        )
        .await;
    assert_eq!((paused.status, &paused.json()["paused_by"]), (201, &json!("ops")));
    api.send("GET", "/metrics", &[], "").await.problem(401, "unauthorized");
    assert_eq!(api.ask("GET", "/metrics", &token).await.status, 200);
    assert_eq!(api.send("GET", "/healthz", &[], "").await.status, 200);

    let wrong = lab.config("# tokens\n\nops all sha256:00\n");
    for (tokens, said) in [
        (wrong.as_str(), format!("oncebox: api.tokens: {wrong}, line 3: scope \"all\" is neither \"read\" nor")),
        ("/nowhere/tokens", "oncebox: api.tokens: /nowhere/tokens: No such file".to_owned()),
    ] {
        let config = lab.config(&format!("[api]\ntokens = {tokens:?}\n"));
        let output = lab.command(&["serve", "--config", &config]).output().expect("it runs");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(&said) && stderr.lines().count() == 1, "{stderr}");
    }
    let output = lab.command(&["serve"]).env("ONCEBOX_API_TOKEN", "se cret").output().expect("it runs");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.starts_with("oncebox: ONCEBOX_API_TOKEN: must be"), "{stderr}");
    assert!(!stderr.contains("cret"), "{stderr}");
}

/// Rows of both sides that are parked, without relay and consumer, which other tests have.
async fn park(lab: &Lab) {
    lab.sql(
        "insert into oncebox.outbox_held (lane, seq, plan_n, state, reason, attempts, source, stream, \"offset\",
            ordinal, message_id, topic, key, content_type, headers, body, published_at)
        select 0, i, 0, 'parked', case when i % 2 = 0 then 'unroutable' else 'expired' end, 1, s.source,
            'order.placed#0', i, i, ('019b8d6e-2b00-7c3a-8f00-' || lpad(i::text, 12, '0'))::uuid, 'order.placed', 'k',
            case when i = 3 then 'application/octet-stream' else 'application/json' end, '{\"trace\": \"abc\"}',
            case when i = 3 then '\\xff00'::bytea else '{\"big\": 12345678901234567890123}' end, clock_timestamp()
        from generate_series(1, 7) as i cross join oncebox.outbox_source as s;
        insert into oncebox.inbox_held (consumer, message_id, state, reason, attempts, source, stream, \"offset\", key,
            topic, content_type, headers, body)
        select c, ('019b8d6e-2b00-7c3a-8f00-' || lpad(i::text, 12, '0'))::uuid, 'parked', 'too_many_attempts', 5,
            s.source, 'order.placed#0', i, 'k', 'order.placed', 'application/json', '{}', '{\"n\": 1}'
        from generate_series(1, 3) as i cross join (values ('billing'), ('a/b ü')) as consumers (c)
        cross join oncebox.outbox_source as s;",
    )
    .await;
}

/// Every item of a list, by following its links; how many pages that took.
async fn walk(api: &Api, path: &str) -> (Vec<Value>, usize) {
    let (mut items, mut pages, mut next) = (Vec::new(), 0, path.to_owned());
    loop {
        let answer = api.get(&next).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let page = answer.json();
        items.extend(page["items"].as_array().expect("items").iter().cloned());
        pages += 1;
        assert_eq!(answer.headers.contains_key("link"), page["next"].is_string(), "{answer:?}");
        let Some(link) = answer.headers.get("link") else { return (items, pages) };
        next = link.strip_prefix('<').and_then(|l| l.strip_suffix(">; rel=\"next\"")).expect("a link").to_owned();
        assert!(next.contains(page["next"].as_str().unwrap()), "{next}");
        assert!(pages < 100, "the links go round");
    }
}

/// Goal: the outbox and its relays are shown as they are, and streams and parked messages by the page.
#[tokio::test]
async fn the_outbox_is_shown() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let relay = lab.relay().await;
    lab.sql(
        "select oncebox.publish(t || '.placed', '{}') from unnest(array['a', 'b', 'c']) as t cross join
        generate_series(1, 2)",
    )
    .await;
    // No queue is bound: all of it is parked by the relay itself.
    eventually_number(&mut lab.connect().await, "select count(*) from oncebox.parked", 6).await;
    let look = api.get("/v1/outbox").await.json();
    assert_eq!(look["lanes"][0]["lane"], 0);
    assert_eq!(look["lanes"][0]["held"]["parked"], json!({"unroutable": 6}));
    assert_eq!(look["pauses"], json!([]));
    let relays = api.get("/v1/relays").await.json();
    assert_eq!((relays["items"].as_array().unwrap().len(), &relays["items"][0]["lanes"]), (1, &json!([0])));
    let (streams, pages) = walk(&api, "/v1/outbox/streams?limit=2").await;
    let shown: Vec<_> =
        streams.iter().map(|s| (s["stream"].as_str().unwrap(), s["produced"].as_i64().unwrap())).collect();
    assert_eq!((shown, pages), (vec![("a.placed#0", 2), ("b.placed#0", 2), ("c.placed#0", 2)], 2));
    assert_eq!(streams[0]["parked"], 2);
    let (parked, pages) = walk(&api, "/v1/outbox/parked?limit=4&topic=%23").await;
    assert_eq!((parked.len(), pages), (6, 2));
    let seqs: Vec<_> = parked.iter().map(|p| p["seq"].as_i64().unwrap()).collect();
    assert!(seqs.is_sorted(), "{seqs:?}");
    assert_eq!(walk(&api, "/v1/outbox/parked?topic=a.*&reason=unroutable").await.0.len(), 2);
    assert_eq!(walk(&api, "/v1/outbox/parked?reason=expired").await.0.len(), 0);
    drop(relay);
}

/// Goal: a parked message is shown digit for digit, retried or given up once, and the records say who and why.
#[tokio::test]
async fn parked_messages_are_acted_on() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    park(&lab).await;
    let shown = api.get("/v1/outbox/parked/0/2").await;
    assert!(shown.body.contains("12345678901234567890123"), "{}", shown.body);
    assert_eq!((&shown.json()["body"]["encoding"], &shown.json()["headers"]["trace"]), (&json!("json"), &json!("abc")));
    let bytes = api.get("/v1/outbox/parked/0/3").await.json();
    assert_eq!(bytes["body"], json!({"encoding": "hex", "value": "ff00"}));
    let id = "019b8d6e-2b00-7c3a-8f00-000000000002";
    assert_eq!(walk(&api, &format!("/v1/outbox/parked?message_id={id}")).await.0.len(), 1);

    let because = json!({"reason": "the queue is bound again"});
    let retried = api.post("/v1/outbox/parked/0/2/actions/retry", &because).await;
    assert_eq!(retried.status, 200, "{retried:?}");
    assert_eq!(
        retried.json(),
        json!({"action": "retry", "by": "ONCEBOX_API_TOKEN", "reason": "the queue is bound again"})
    );
    let state = "select count(*) from oncebox.outbox_held where seq = 2 and state = 'waiting'";
    assert_eq!(lab.number(state).await, 1);
    api.post("/v1/outbox/parked/0/2/actions/retry", &because).await.problem(404, "not-found");
    let discarded = api.post("/v1/outbox/parked/0/3/actions/discard", &json!({"reason": "astray"})).await;
    assert_eq!(discarded.status, 200, "{discarded:?}");
    api.get("/v1/outbox/parked/0/3").await.problem(404, "not-found");
    let record = "select count(*) from oncebox.outbox_discarded as d where to_jsonb(d) @>
        '{\"seq\": 3, \"why\": \"astray\", \"discarded_by\": \"ONCEBOX_API_TOKEN\"}'";
    assert_eq!(lab.number(record).await, 1, "{:?}", lab.number("select count(*) from oncebox.outbox_discarded").await);
    eventually("the log says who retried and why", || async {
        let log = api.process.log();
        (log.contains("the queue is bound again") && log.contains("ONCEBOX_API_TOKEN")).then_some(())
    })
    .await;

    // The inbox, with a name that needs encoding.
    let inbox = api.get("/v1/inbox").await.json();
    let names: Vec<_> =
        inbox["consumers"].as_array().unwrap().iter().map(|c| c["consumer"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 2, "{inbox}");
    let (parked, pages) = walk(&api, "/v1/inbox/parked?limit=2").await;
    assert_eq!((parked.len(), pages), (6, 3));
    assert_eq!(walk(&api, "/v1/inbox/parked?consumer=a%2Fb+%C3%BC").await.0.len(), 3);
    let one = format!("/v1/inbox/parked/a%2Fb%20%C3%BC/{id}");
    assert_eq!(api.get(&one).await.json()["body"], json!({"encoding": "json", "value": {"n": 1}}));
    assert_eq!(api.post(&format!("{one}/actions/retry"), &because).await.status, 200);
    api.post(&format!("{one}/actions/discard"), &because).await.problem(404, "not-found");
    let other = format!("/v1/inbox/parked/billing/{id}/actions/discard");
    assert_eq!(api.post(&other, &because).await.status, 200);
    let record = "select count(*) from oncebox.inbox_discarded as d where to_jsonb(d) @>
        '{\"consumer\": \"billing\", \"why\": \"the queue is bound again\", \"discarded_by\": \"ONCEBOX_API_TOKEN\"}'";
    assert_eq!(lab.number(record).await, 1);
}

/// Goal: pauses are made once, shown, and lifted one by one.
#[tokio::test]
async fn pauses_are_made_and_lifted() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    let new = json!({"topic": "order.#", "reason": "the shop is moved"});
    let made = api.post("/v1/outbox/pauses", &new).await;
    assert_eq!(made.status, 201, "{made:?}");
    let location = made.header("location").to_owned();
    assert_eq!(made.json()["why"], "the shop is moved");
    let again = api.post("/v1/outbox/pauses", &json!({"topic": "order.#", "reason": "other"})).await;
    assert_eq!((again.status, again.header("location"), again.json()), (200, location.as_str(), made.json()));
    assert_eq!(api.post("/v1/outbox/pauses", &json!({"lane": 0, "reason": "x"})).await.status, 201);
    assert_eq!(api.get("/v1/outbox/pauses").await.json()["items"].as_array().unwrap().len(), 2);
    assert_eq!(api.get(&location).await.json(), made.json());
    for (body, pointer) in [
        (json!({"topic": "a*.b", "reason": "x"}), "/topic"),
        (json!({"lane": 99, "reason": "x"}), "/lane"),
        (json!({"topic": "a", "reason": " "}), "/reason"),
        (json!({"topic": "a"}), ""),
        (json!({"topics": "a", "reason": "x"}), "/topics"),
    ] {
        let problem = api.post("/v1/outbox/pauses", &body).await.problem(422, "invalid");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let resumed = api.post(&format!("{location}/actions/resume"), &json!({"reason": "moved"})).await;
    assert_eq!((resumed.status, &resumed.json()["pause"]), (200, &made.json()));
    api.get(&location).await.problem(404, "not-found");
    api.post(&format!("{location}/actions/resume"), &json!({"reason": "moved"})).await.problem(404, "not-found");
    assert_eq!(lab.number("select count(*) from oncebox.outbox_pause").await, 1, "the other stays");
}

/// Goal: the audit says what is missing, as figures and not as an error.
#[tokio::test]
async fn the_audit_answers_with_its_findings() {
    let lab = Lab::shared().await;
    let api = Api::start(&lab).await;
    lab.sql(
        "create schema app; create table app.effect (id uuid);
        create function app.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
        language sql as 'insert into app.effect values (message_id)'",
    )
    .await;
    let config =
        lab.config("[[consumer]]\nname = \"app\"\nbindings = [\"order.#\"]\nhandler = { sql = \"app.on_message\" }\n");
    let mut consumer = lab.consume(&config).await;
    let _relay = lab.relay().await;
    lab.sql("select oncebox.publish('order.placed', '{}') from generate_series(1, 5)").await;
    eventually_number(&mut lab.connect().await, "select count(*) from app.effect", 5).await;
    consumer.stop().await;
    // What the relay has not settled yet is not missing.
    eventually("the relay has settled them", async || {
        let audit = api.get("/v1/audit?grace=100ms").await.json();
        (audit["streams"][0]["published"] == json!(5)).then_some(())
    })
    .await;
    let clean = api.get("/v1/audit?grace=100ms").await;
    assert_eq!(clean.status, 200, "{clean:?}");
    let clean = clean.json();
    assert_eq!((&clean["is_clean"], &clean["consumers"][0]["applied"]), (&json!(true), &json!(5)), "{clean}");
    // As if the third had never come.
    lab.sql(
        "select oncebox.inbox_fold(); update oncebox.inbox_ledger set offsets = offsets - '{[3,4)}'::int8multirange",
    )
    .await;
    let bad = api.get("/v1/audit?grace=100ms&consumer=app").await;
    assert_eq!(bad.status, 200, "{bad:?}");
    let bad = bad.json();
    assert_eq!((&bad["is_clean"], &bad["missing_count"]), (&json!(false), &json!(1)), "{bad}");
    assert_eq!((&bad["consumers"][0]["missing"], &bad["missing"][0]["offset"]), (&json!([[3, 3]]), &json!(3)), "{bad}");
    let (streams, _) = walk(&api, "/v1/inbox/streams?consumer=app").await;
    assert_eq!((&streams[0]["settled"], &streams[0]["last_offset"]), (&json!(4), &json!(5)), "{streams:?}");
    api.get("/v1/audit?consumer=nobody").await.problem(404, "not-found");
    for wrong in ["grace=1h", "grace=11s", "grace=5", "grace=", "since=1h", "grace=1s&grace=1s"] {
        api.get(&format!("/v1/audit?{wrong}")).await.problem(400, "malformed");
    }
}
