// What the AI SDK's DeepSeek provider sees of a server. Called by tests/clients.rs as `deepseek_client.mjs URL KEY MODEL`;
// prints a line for each part and fails at the first thing that is not as it should be.

import assert from 'node:assert/strict';
import { createDeepSeek } from '@ai-sdk/deepseek';
import { generateText, jsonSchema, Output, streamText, tool } from 'ai';
import { z } from 'zod';

const [url, apiKey, name] = process.argv.slice(2);
const deepseek = createDeepSeek({ baseURL: url, apiKey });
const model = deepseek(name);
const off = { deepseek: { thinking: { type: 'disabled' } } };
const on = { deepseek: { thinking: { type: 'enabled' } } };
const prompt = 'Tell me of the king and his ship.';
const few = { model, prompt, temperature: 0, maxOutputTokens: 12, maxRetries: 0, providerOptions: off };

async function text() {
  const answer = await generateText(few);
  assert.ok(answer.text.length > 0);
  assert.equal(answer.finishReason, 'length');
  assert.equal(answer.usage.outputTokens, 12);
  const again = await generateText(few);
  assert.equal(again.text, answer.text);
  // DeepSeek's own fields.
  const own = again.providerMetadata.deepseek;
  assert.ok(own.promptCacheHitTokens > 0, JSON.stringify(own));
  assert.equal(own.promptCacheHitTokens + own.promptCacheMissTokens, again.usage.inputTokens);
}

async function streams() {
  const whole = (await generateText(few)).text;
  const stream = streamText(few);
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  assert.equal(pieces.join(''), whole);
  assert.ok(pieces.length > 1);
  assert.equal((await stream.usage).outputTokens, 12);
}

async function reasoning() {
  const answer = await generateText({ ...few, providerOptions: on });
  assert.ok(answer.reasoningText.length > 0);
  assert.equal(answer.text, '');
  const stream = streamText({ ...few, providerOptions: on });
  let seen = '';
  for await (const part of stream.fullStream) if (part.type === 'reasoning-delta') seen += part.text;
  // The provider leaves the temperature out where the model thinks, so it is another text.
  assert.ok(seen.length > 0);
  assert.equal(await stream.text, '');
}

async function tools() {
  const weather = tool({
    description: 'The weather of a place.',
    inputSchema: z.object({ place: z.enum(['Berlin', 'Paris', 'Rome']), days: z.number().int().min(1).max(7) }),
  });
  const options = { ...few, maxOutputTokens: 200, tools: { weather }, toolChoice: 'required' };
  const answer = await generateText(options);
  // A model that knows nothing of tools calls them until it is cut off, within a call perhaps.
  assert.ok(['tool-calls', 'length'].includes(answer.finishReason), answer.finishReason);
  assert.equal(answer.toolCalls[0].toolName, 'weather');
  assert.ok(['Berlin', 'Paris', 'Rome'].includes(answer.toolCalls[0].input.place));
  const stream = streamText(options);
  const calls = [];
  for await (const part of stream.fullStream) if (part.type === 'tool-call') calls.push(part);
  assert.deepEqual(calls[0].input, answer.toolCalls[0].input);
}

async function objects() {
  const schema = jsonSchema({
    type: 'object',
    properties: { masts: { type: 'integer', minimum: 0, maximum: 9 } },
    required: ['masts'],
    additionalProperties: false,
  });
  const answer = await generateText({ ...few, maxOutputTokens: 400, output: Output.json(schema) });
  if (answer.finishReason === 'stop') assert.equal(typeof JSON.parse(answer.text), 'object');
}

async function errors() {
  const stranger = createDeepSeek({ baseURL: url, apiKey: 'sk-this-is-no-key-of-theirs' });
  await assert.rejects(generateText({ ...few, model: stranger(name) }), (error) => error.statusCode === 401);
  await assert.rejects(generateText({ ...few, model: deepseek('gpt-17') }), (error) => error.statusCode === 404);
}

async function cancelled() {
  const controller = new AbortController();
  const stream = streamText({ ...few, maxOutputTokens: 1500, abortSignal: controller.signal });
  await assert.rejects(async () => {
    for await (const part of stream.fullStream) {
      if (part.type === 'text-delta') controller.abort();
      if (part.type === 'abort') throw new Error('aborted');
    }
  });
}

for (const part of [text, streams, reasoning, tools, objects, errors, cancelled]) {
  await part();
  console.log('ok', part.name);
}
