// Ask a served reader from Node.js by Triton's gRPC protocol:
//
//   python ../write_protocol.py && npm install
//   node ask.js 127.0.0.1:8001 fido "what is the capital of France?" "Its capital is Paris." "Another passage."
//
// Triton's .proto files (triton-inference-server/common) work in the place of triton.protoset, and in any other language.
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const [url, model, question, ...passages] = process.argv.slice(2);
if (passages.length === 0) {
  console.error("usage: node ask.js HOST:PORT MODEL QUESTION PASSAGE...");
  process.exit(2);
}

const protocol = protoLoader.loadFileDescriptorSetFromBuffer(fs.readFileSync(path.join(__dirname, "triton.protoset")), { keepCase: true });
const { inference } = grpc.loadPackageDefinition(protocol);
const client = new inference.GRPCInferenceService(url, grpc.credentials.createInsecure());

const texts = (name, values) => ({
  name,
  datatype: "BYTES",
  shape: [values.length],
  contents: { bytes_contents: values.map((value) => Buffer.from(value, "utf8")) },
});

const request = { model_name: model, inputs: [texts("question", [question]), texts("passages", passages)] };
client.ModelInfer(request, { deadline: Date.now() + 60000 }, (error, response) => {
  if (error) {
    console.error(`error: ${error.details}`);
    process.exit(1);
  }
  const raw = Object.fromEntries(response.outputs.map((output, index) => [output.name, response.raw_output_contents[index]]));
  // an element of type BYTES is its length, four bytes with the lowest first, and its bytes
  const answer = raw.answer.subarray(4, 4 + raw.answer.readUInt32LE(0)).toString("utf8");
  const scores = passages.map((_, index) => raw.passage_scores.readFloatLE(4 * index).toFixed(2));
  console.log(`answer    ${answer}`);
  console.log(`log-prob  ${raw.log_prob.readFloatLE(0).toFixed(4)}`);
  console.log(`scores    ${scores.join(" ")}`);
});
