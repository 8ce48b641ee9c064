"""The store's schema, as the list of steps that lead to it; a step that was released is never changed."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE studies (
        name TEXT PRIMARY KEY,
        question TEXT NOT NULL,
        toml TEXT NOT NULL,
        opened_at TEXT NOT NULL
    );
    CREATE TABLE facts (
        key TEXT PRIMARY KEY,           -- of data, partition and seed
        facts TEXT NOT NULL,            -- DataFacts as JSON
        fingerprint TEXT NOT NULL       -- of every image and label
    );
    CREATE TABLE runs (
        key TEXT PRIMARY KEY,           -- of the TrainSpec
        spec TEXT NOT NULL,
        history TEXT NOT NULL,
        guarantee TEXT NOT NULL,
        provenance TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        seconds REAL NOT NULL,
        peak_memory_bytes INTEGER NOT NULL,
        num_parameters INTEGER NOT NULL
    );
    CREATE TABLE artefacts (
        key TEXT PRIMARY KEY,           -- of run and CompressionSpec
        run_key TEXT NOT NULL REFERENCES runs (key),
        compression TEXT NOT NULL,
        file_bytes INTEGER NOT NULL,
        sparsity REAL NOT NULL,
        guarantee TEXT NOT NULL,
        seconds REAL NOT NULL
    );
    CREATE TABLE evaluations (
        key TEXT PRIMARY KEY,           -- of artefact, EvaluationSpec and the sources of transferred attacks
        artefact_key TEXT NOT NULL REFERENCES artefacts (key),
        spec TEXT NOT NULL,
        provenance TEXT NOT NULL,
        seconds REAL NOT NULL
    );
    CREATE TABLE measurements (
        evaluation_key TEXT NOT NULL REFERENCES evaluations (key),
        position INTEGER NOT NULL,
        metric TEXT NOT NULL,
        value REAL,                     -- NULL where undefined: missing is not zero
        low REAL,
        high REAL,
        n INTEGER NOT NULL,
        unit TEXT NOT NULL,
        split TEXT NOT NULL,
        status TEXT NOT NULL,
        reason TEXT NOT NULL,
        radius REAL,
        source TEXT,
        client TEXT,
        PRIMARY KEY (evaluation_key, position)
    );
    CREATE TABLE outcomes (
        evaluation_key TEXT NOT NULL REFERENCES evaluations (key),
        position INTEGER NOT NULL,
        radius REAL,
        source TEXT,
        num_classes INTEGER NOT NULL,
        logits BLOB NOT NULL,           -- float32, little-endian, records by classes
        PRIMARY KEY (evaluation_key, position)
    );
    CREATE TABLE examples (
        evaluation_key TEXT NOT NULL REFERENCES evaluations (key),
        position INTEGER NOT NULL,
        title TEXT NOT NULL,
        clean_png BLOB NOT NULL,
        perturbation_png BLOB NOT NULL,
        adversarial_png BLOB NOT NULL,
        scale REAL NOT NULL,
        truth TEXT NOT NULL,
        clean_class TEXT NOT NULL,
        clean_confidence REAL NOT NULL,
        adversarial_class TEXT NOT NULL,
        adversarial_confidence REAL NOT NULL,
        PRIMARY KEY (evaluation_key, position)
    );
    """,
    # What the hospitals' budget books hold of a training; one that is older than this column counts as not booked.
    "ALTER TABLE runs ADD COLUMN lineage TEXT NOT NULL DEFAULT '{}'",
)
