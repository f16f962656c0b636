FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
# The caches are not part of the layer, so the program is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin oncebox && cp target/release/oncebox /usr/local/bin/

FROM debian:bookworm-slim
# The roots that TLS connections to the database and the broker are checked against.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home oncebox
COPY --from=build /usr/local/bin/oncebox /usr/local/bin/oncebox
USER 10001
EXPOSE 7077
ENTRYPOINT ["oncebox"]
CMD ["run"]
