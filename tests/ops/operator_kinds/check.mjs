// Objects of prometheus-operator against the schemas of its kinds, as its types for JavaScript have them.
//
//     node check.mjs < objects.json      an array of objects in, an array of arrays of complaints out
//
// These validators pass over fields that they do not know, as the API server does, which then drops them: a monitor
// with `sampleLimt` would be taken, and have no limit. So each object is handed over in a wrapping that notes which
// fields are looked at. A field that no validator looked at is one that no schema has.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const kinds = await import("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1");

/** The value, with the path of each of its fields that is read put into `read`. */
function noting(value, read, path = "") {
  if (value === null || typeof value !== "object") return value;
  return new Proxy(value, {
    get(target, key) {
      const field = Reflect.get(target, key);
      if (typeof key === "symbol" || !Object.hasOwn(target, key)) return field;
      const where = `${path}/${key}`;
      read.add(where);
      return noting(field, read, where);
    },
  });
}

/** The topmost fields below `value` that are not in `read`. */
function* unread(value, read, path = "") {
  if (value === null || typeof value !== "object") return;
  for (const [key, field] of Object.entries(value)) {
    const where = `${path}/${key}`;
    if (read.has(where)) yield* unread(field, read, where);
    else yield where;
  }
}

function complaints(object) {
  const kind = object.apiVersion === "monitoring.coreos.com/v1" ? kinds[object.kind] : undefined;
  if (kind === undefined) return [`no kind of prometheus-operator: ${object.apiVersion} ${object.kind}`];
  const found = [];
  const read = new Set();
  try {
    // `validate` as of the kind itself: an instance would hold a copy, of which nobody could tell what is read.
    kind.prototype.validate.call(noting(object, read));
  } catch (error) {
    found.push(error.message);
  }
  for (const where of unread(object, read)) found.push(`${where} is no field`);
  return found;
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(complaints)));
