BEGIN TRANSACTION;
CREATE TABLE artifacts (
	sha256 VARCHAR(64) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	PRIMARY KEY (sha256, owner)
);
INSERT INTO "artifacts" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ada','PIVOT',9);
CREATE TABLE contributions (
	round_id VARCHAR(20) NOT NULL, 
	participant VARCHAR(40) NOT NULL, 
	status VARCHAR(12) NOT NULL, 
	attempt INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	committed_unix_ms BIGINT NOT NULL, 
	detail TEXT NOT NULL, 
	report_json TEXT NOT NULL, 
	PRIMARY KEY (round_id, participant)
);
INSERT INTO "contributions" VALUES('rnd-1','st-mary','committed',1,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',5,1790000007000,'','');
INSERT INTO "contributions" VALUES('rnd-1','st-luke','refused',1,'',0,0,'policy: no logits','{}');
INSERT INTO "contributions" VALUES('rnd-2','st-mary','committed',1,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',5,1790000014000,'','');
INSERT INTO "contributions" VALUES('rnd-2','st-luke','refused',1,'',0,0,'policy: no logits','{}');
CREATE TABLE events (
	seq INTEGER NOT NULL, 
	round_id VARCHAR(20) NOT NULL, 
	time_unix_ms BIGINT NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	body_json TEXT NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "events" VALUES(1,'rnd-1',1790000004000,'state','{"state": "SUBMITTED", "detail": ""}');
INSERT INTO "events" VALUES(2,'rnd-1',1790000005000,'state','{"state": "APPROVED", "detail": ""}');
INSERT INTO "events" VALUES(3,'rnd-1',1790000006000,'state','{"state": "COLLECTING", "detail": ""}');
INSERT INTO "events" VALUES(4,'rnd-1',1790000008000,'contribution','{"participant": "st-mary", "status": "committed", "size_bytes": 5}');
INSERT INTO "events" VALUES(5,'rnd-1',1790000009000,'contribution','{"participant": "st-luke", "status": "refused", "detail": "policy: no logits"}');
INSERT INTO "events" VALUES(6,'rnd-2',1790000011000,'state','{"state": "SUBMITTED", "detail": ""}');
INSERT INTO "events" VALUES(7,'rnd-2',1790000012000,'state','{"state": "APPROVED", "detail": ""}');
INSERT INTO "events" VALUES(8,'rnd-2',1790000013000,'state','{"state": "COLLECTING", "detail": ""}');
INSERT INTO "events" VALUES(9,'rnd-2',1790000015000,'contribution','{"participant": "st-mary", "status": "committed", "size_bytes": 5}');
INSERT INTO "events" VALUES(10,'rnd-2',1790000016000,'contribution','{"participant": "st-luke", "status": "refused", "detail": "policy: no logits"}');
INSERT INTO "events" VALUES(11,'rnd-3',1790000018000,'state','{"state": "SUBMITTED", "detail": ""}');
INSERT INTO "events" VALUES(12,'rnd-1',1790000019000,'state','{"state": "FUSING", "detail": "st-luke refused"}');
INSERT INTO "events" VALUES(13,'rnd-1',1790000020000,'state','{"state": "EVALUATING", "detail": ""}');
INSERT INTO "events" VALUES(14,'rnd-1',1790000022000,'state','{"state": "PUBLISHED", "detail": ""}');
CREATE TABLE participants (
	name VARCHAR(40) NOT NULL, 
	node_id VARCHAR(24) NOT NULL, 
	public_key BLOB NOT NULL, 
	joined_unix_ms BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "participants" VALUES('st-mary','18446744073709551611',X'00016B6579',1790000000000);
INSERT INTO "participants" VALUES('st-luke','7',X'6B657932',1790000001000);
CREATE TABLE pivots (
	name VARCHAR(20) NOT NULL, 
	parent VARCHAR(20) NOT NULL, 
	round_id VARCHAR(20) NOT NULL, 
	files_json TEXT NOT NULL, 
	evals_json TEXT NOT NULL, 
	created_unix_ms BIGINT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "pivots" VALUES('pivot-0','','','[{"name": "model.safetensors", "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "size_bytes": 9}]','{}',1790000002000);
INSERT INTO "pivots" VALUES('pivot-1','pivot-0','rnd-1','[{"name": "model.safetensors", "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "size_bytes": 9}]','{"bpb": 1.5}',1790000021000);
CREATE TABLE rounds (
	number INTEGER NOT NULL, 
	request_id VARCHAR(120) NOT NULL, 
	submitted_by VARCHAR(40) NOT NULL, 
	spec_json TEXT NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	created_unix_ms BIGINT NOT NULL, 
	deadline_unix_ms BIGINT NOT NULL, 
	detail TEXT NOT NULL, 
	pivot_name VARCHAR(20) NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (request_id)
);
INSERT INTO "rounds" VALUES(1,'ada/q0','ada','{"pivot": "pivot-0"}','PUBLISHED',1790000003000,1790003603000,'','pivot-1');
INSERT INTO "rounds" VALUES(2,'ada/q1','ada','{"pivot": "pivot-0"}','COLLECTING',1790000010000,1790003610000,'','');
INSERT INTO "rounds" VALUES(3,'ada/q2','ada','{"pivot": "pivot-0"}','SUBMITTED',1790000017000,1790003617000,'','');
CREATE INDEX ix_events_round_id ON events (round_id);
COMMIT;
